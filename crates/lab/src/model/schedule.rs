//! One scheduler step: who computes how many tokens, with which blocks, and what comes out.

use std::time::Duration;

use kvroute_core::Time;
use kvroute_core::event::{BlockRemoved, BlockStored, Extra, GroupKind, KvEvent, Tier};

use super::pool::BlockId;
use super::{Arrival, Emitted, EngineModel, FinishReason, Finished, Request, Slot, Step, StepWork};

/// The share of one sequence in a step.
struct Share {
    slot: Slot,
    start: u32,
    tokens: u32,
}

impl EngineModel {
    /// Takes in what arrived, schedules a step that begins `now`, and computes it. `None` when
    /// there is nothing to compute; statistics are up to date then, too.
    pub fn next_step(&mut self, now: Time) -> Option<Step> {
        self.take_in();
        if self.running.is_empty() && self.waiting.is_empty() {
            self.publish_stats();
            return None;
        }
        let mut shares = Vec::new();
        let mut budget = self.config.max_num_batched_tokens;
        let preempted = self.schedule_running(&mut budget, &mut shares);
        if !preempted {
            self.schedule_waiting(now, &mut budget, &mut shares);
        }
        let work = self.work(&shares);
        let seconds = self.profile.step_duration(&work).as_secs_f64() * self.pace;
        let duration = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        let end = now + duration;
        let (mut emitted, mut finished) = (Vec::new(), Vec::new());
        for share in &shares {
            self.compute(share, end, &mut emitted, &mut finished);
        }
        self.stats.steps += 1;
        self.publish_stats();
        Some(Step {
            duration,
            work,
            tokens: shares.iter().map(|share| share.tokens).sum(),
            emitted,
            finished,
            events: std::mem::take(&mut self.events),
            stats: self.stats.clone(),
        })
    }

    fn take_in(&mut self) {
        self.stats.deferred = 0;
        while let Some(arrival) = self.inbox.pop_front() {
            match arrival {
                Arrival::Submit(slot) => self.waiting.push_back(slot),
                Arrival::Abort(id) => {
                    if let Some(&slot) = self.requests.ids.get(&id) {
                        let request = self.requests.remove(slot);
                        self.pool.release(request.blocks.into_iter().rev());
                        self.running.retain(|&other| other != slot);
                        self.waiting.retain(|&other| other != slot);
                        self.stats.aborted += 1;
                    }
                }
            }
        }
    }

    /// Decodes and further prefill chunks. Says whether a sequence was preempted: then nobody is
    /// admitted in this step.
    fn schedule_running(&mut self, budget: &mut u32, shares: &mut Vec<Share>) -> bool {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let slot = self.running[index];
            let request = &self.requests[slot];
            let (start, tokens) =
                (request.computed, (request.len() - request.computed).min(*budget));
            let mut placed = self.allocate(slot, tokens, &[]);
            while !placed {
                let Some(victim) = self.running.pop() else { break };
                self.preempt(victim);
                preempted = true;
                if victim == slot {
                    break;
                }
                placed = self.allocate(slot, tokens, &[]);
            }
            if !placed {
                break;
            }
            shares.push(Share { slot, start, tokens });
            *budget -= tokens;
            index += 1;
        }
        preempted
    }

    /// First come, first served; a request whose adapter does not fit this step is passed over.
    fn schedule_waiting(&mut self, now: Time, budget: &mut u32, shares: &mut Vec<Share>) {
        let mut adapters: Vec<usize> = match self.config.adapters.is_empty() {
            true => Vec::new(),
            false => shares.iter().filter_map(|s| self.requests[s.slot].adapter).collect(),
        };
        adapters.sort_unstable();
        adapters.dedup();
        let mut passed_over = Vec::new();
        while *budget > 0 && self.running.len() < self.config.max_num_seqs as usize {
            let Some(&slot) = self.waiting.front() else { break };
            let adapter = self.requests[slot].adapter;
            let known = adapter.is_none_or(|adapter| adapters.contains(&adapter));
            if !known && adapters.len() >= self.config.max_loras as usize {
                self.waiting.pop_front();
                passed_over.push(slot);
                continue;
            }
            let Some(share) = self.admit(now, slot, *budget) else { break };
            if !known {
                adapters.extend(adapter);
            }
            *budget -= share.tokens;
            shares.push(share);
        }
        self.stats.deferred = passed_over.len() as u32;
        passed_over.into_iter().rev().for_each(|slot| self.waiting.push_front(slot));
    }

    fn admit(&mut self, now: Time, slot: Slot, budget: u32) -> Option<Share> {
        let size = self.config.block_size;
        let request = &self.requests[slot];
        let reusable = ((request.len() - 1) / size) as usize;
        let hits: Vec<BlockId> =
            request.names[..reusable].iter().map_while(|&name| self.pool.find(name)).collect();
        if self.config.events && request.report_reused && !hits.is_empty() {
            let event = self.stored(request, 0, hits.len());
            self.events.push(event);
        }
        let request = &self.requests[slot];
        let start = hits.len() as u32 * size;
        let tokens = (request.len() - start).min(budget);
        let revived = hits.iter().filter(|&&block| self.pool.is_free(block)).count() as u32;
        let needed = request.len().div_ceil(size) - hits.len() as u32 + revived;
        if self.config.reserve_full_prompt && needed > self.pool.free() {
            return None;
        }
        if !self.allocate(slot, tokens, &hits) {
            return None;
        }
        self.waiting.pop_front();
        self.running.push(slot);
        let request = self.requests.get_mut(slot);
        request.computed = start;
        request.admitted.get_or_insert(now);
        request.cached_tokens.get_or_insert(start);
        if request.preemptions == 0 {
            self.stats.prefix_queries_tokens += u64::from(request.len());
            self.stats.prefix_hits_tokens += u64::from(start);
        }
        Some(Share { slot, start, tokens })
    }

    /// Gives a sequence the blocks it needs for `tokens` more, `hits` of them from the cache, and
    /// names those that become full. Does nothing and says no when too few are free.
    fn allocate(&mut self, slot: Slot, tokens: u32, hits: &[BlockId]) -> bool {
        let size = self.config.block_size;
        let request = self.requests.get_mut(slot);
        let total = request.computed + hits.len() as u32 * size + tokens;
        let held = request.blocks.len() + hits.len();
        let missing = (total.div_ceil(size) as usize).saturating_sub(held);
        let revived = hits.iter().filter(|&&block| self.pool.is_free(block)).count();
        if missing + revived > self.pool.free() as usize {
            return false;
        }
        hits.iter().for_each(|&block| self.pool.touch(block));
        request.blocks.extend_from_slice(hits);
        request.named += hits.len() as u32;
        for _ in 0..missing {
            let (block, evicted) = self.pool.take().expect("the count of free blocks was checked");
            request.blocks.push(block);
            if let Some(name) = evicted.filter(|_| self.config.events) {
                self.events.push(KvEvent::Removed(BlockRemoved {
                    hashes: vec![name].into(),
                    tier: Tier::Gpu,
                    group: Some(0),
                }));
            }
        }
        if total / size > request.named {
            self.name_full_blocks(slot, total / size);
        }
        true
    }

    fn name_full_blocks(&mut self, slot: Slot, full: u32) {
        let request = self.requests.get_mut(slot);
        let (from, to) = (request.named as usize, full as usize);
        request.named = full;
        for i in from..to {
            self.pool.name(request.blocks[i], request.names[i]);
        }
        if self.config.events {
            let event = self.stored(&self.requests[slot], from, to);
            self.events.push(event);
        }
    }

    fn stored(&self, request: &Request, from: usize, to: usize) -> KvEvent {
        let size = self.config.block_size as usize;
        let salt = request.cache_salt.as_ref().filter(|_| from == 0);
        let mut extras = Vec::new();
        if let Some(salt) = salt {
            extras.resize(to - from, Vec::new());
            extras[0].push(Extra::Text(salt.clone()));
        }
        KvEvent::Stored(BlockStored {
            hashes: request.names[from..to].to_vec().into(),
            parent: from.checked_sub(1).map(|parent| request.names[parent]),
            tokens: request.tokens[from * size..to * size].to_vec().into(),
            block_size: self.config.block_size,
            lora_name: request.adapter.map(|i| self.config.adapters[i].name.clone()),
            tier: Tier::Gpu,
            extras,
            group: Some(0),
            kind: GroupKind::Full,
        })
    }

    fn preempt(&mut self, slot: Slot) {
        let request = self.requests.get_mut(slot);
        let blocks = std::mem::take(&mut request.blocks);
        (request.computed, request.named) = (0, 0);
        request.preemptions += 1;
        self.pool.release(blocks.into_iter().rev());
        self.waiting.push_front(slot);
        self.stats.preemptions += 1;
    }

    fn work(&self, shares: &[Share]) -> StepWork {
        let mut work = StepWork {
            sequences: shares.len() as u64,
            unique_tokens: u64::from(self.pool.used()) * u64::from(self.config.block_size),
            ..StepWork::default()
        };
        for share in shares {
            let (start, tokens) = (u64::from(share.start), u64::from(share.tokens));
            if tokens == 1 && start > 0 {
                work.decode_context_tokens += start + 1;
            } else {
                work.prefill_tokens += tokens;
                work.prefill_positions_doubled += 2 * tokens * start + tokens * tokens;
            }
        }
        work
    }

    /// Advances one sequence; when all its tokens are computed, it says the next one.
    fn compute(
        &mut self,
        share: &Share,
        end: Time,
        emitted: &mut Vec<Emitted>,
        finished: &mut Vec<Finished>,
    ) {
        let request = self.requests.get_mut(share.slot);
        request.computed += share.tokens;
        if request.computed < request.len() {
            return;
        }
        let index = request.output_tokens();
        if index == 0 {
            request.first_token = Some(end);
            self.stats.prompt_tokens += u64::from(request.prompt_tokens);
        }
        let token = request.script.pop_front().unwrap_or_else(|| {
            self.config.output_ids[request.rng.below(self.config.output_ids.len())]
        });
        let gap = end.since(request.last_token);
        request.last_token = end;
        request.tokens.push(token);
        request.extend_names(&self.config, &mut self.hasher);
        self.stats.generation_tokens += 1;
        let finish = match index + 1 {
            n if n >= request.stop_after => Some(FinishReason::Stop),
            n if n >= request.max_tokens => Some(FinishReason::Length),
            _ => None,
        };
        let cached_tokens = request.cached_tokens.unwrap_or(0);
        emitted.push(Emitted { id: request.id, token, index, gap, cached_tokens, finish });
        if let Some(reason) = finish {
            finished.push(self.finish(share.slot, reason, end));
        }
    }

    fn finish(&mut self, slot: Slot, reason: FinishReason, end: Time) -> Finished {
        self.running.retain(|&other| other != slot);
        match reason {
            FinishReason::Stop => self.stats.finished_stop += 1,
            FinishReason::Length => self.stats.finished_length += 1,
        }
        let request = self.requests.remove(slot);
        let since = |time: Option<Time>| time.unwrap_or(end).since(request.submitted);
        let summary = Finished {
            id: request.id,
            reason,
            prompt_tokens: request.prompt_tokens,
            output_tokens: request.output_tokens(),
            max_tokens: request.max_tokens,
            cached_tokens: request.cached_tokens.unwrap_or(0),
            preemptions: request.preemptions,
            queue: since(request.admitted),
            first_token: since(request.first_token),
            total: since(Some(end)),
        };
        self.pool.release(request.blocks.into_iter().rev());
        summary
    }

    fn publish_stats(&mut self) {
        let usable = self.pool.used() + self.pool.free();
        self.stats.running = self.running.len() as u32;
        self.stats.waiting = self.waiting.len() as u32;
        self.stats.kv_usage = f64::from(self.pool.used()) / f64::from(usable);
        if !self.config.adapters.is_empty() {
            self.stats.running_adapters = self.adapter_names(&self.running);
            let waiting: Vec<Slot> = self.waiting.iter().copied().collect();
            self.stats.waiting_adapters = self.adapter_names(&waiting);
        }
    }

    fn adapter_names(&self, slots: &[Slot]) -> Vec<String> {
        let mut indices: Vec<usize> =
            slots.iter().filter_map(|&slot| self.requests[slot].adapter).collect();
        indices.sort_unstable();
        indices.dedup();
        let mut names: Vec<String> =
            indices.into_iter().map(|i| self.config.adapters[i].name.clone()).collect();
        names.sort_unstable();
        names
    }
}
