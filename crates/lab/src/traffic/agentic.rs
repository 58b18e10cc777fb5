//! Sessions of several turns: each prompt is all that was said before, and something new.

use std::sync::Arc;

use super::arrivals::exponential;
use super::popularity::Popularity;
use super::{Call, KEPT_PROMPTS_MAX, KEPT_TOKENS_MAX, PROMPT_TOKENS_MAX, Stream, TrafficError};
use super::{needed, push_tokens, stream};
use crate::scenario::WorkloadSpec;

/// Stages of a run are below 2^20, sessions of a stage below this, turns below 2^10: the number of
/// a turn fits 64 bits.
const SESSIONS_BITS: u32 = 32;

/// Nothing about the sessions on their way: a turn follows from the one before it and the seed.
#[derive(Debug)]
pub(super) struct Agentic {
    seed: u64,
    prefix_tokens: usize,
    question_tokens: usize,
    output_tokens: u32,
    max_tokens: Option<u32>,
    turns: u64,
    think_s: f64,
    groups: Popularity,
    /// System prompts, each made when it is first asked for.
    prefixes: Vec<Option<Arc<[u32]>>>,
}

impl Agentic {
    pub(super) fn new(spec: &WorkloadSpec, seed: u64) -> Result<Agentic, TrafficError> {
        let groups = needed(spec.groups, "groups")?;
        let prefix_tokens = needed(spec.prefix_tokens, "prefix_tokens")?;
        let question_tokens = needed(spec.question_tokens, "question_tokens")?;
        let output_tokens = needed(spec.output_tokens, "output_tokens")?;
        let turns = u64::from(needed(spec.turns, "turns")?);
        let turn_tokens = u64::from(question_tokens) + u64::from(output_tokens);
        let longest = turns.saturating_mul(turn_tokens).saturating_add(prefix_tokens.into());
        if groups == 0 || turns == 0 || question_tokens == 0 || output_tokens == 0 {
            let message = "groups, turns, question_tokens and output_tokens must be above 0";
            return Err(TrafficError::Size(message.into()));
        }
        let kept = u64::from(groups) * u64::from(prefix_tokens);
        let groups_kept = u64::from(groups);
        if longest > PROMPT_TOKENS_MAX || kept > KEPT_TOKENS_MAX || groups_kept > KEPT_PROMPTS_MAX {
            return Err(TrafficError::Size(format!(
                "sessions of {longest} tokens, {groups} groups x {prefix_tokens} tokens: at most \
                 {PROMPT_TOKENS_MAX} tokens in a session, {KEPT_PROMPTS_MAX} system prompts and \
                 {KEPT_TOKENS_MAX} tokens in all of them"
            )));
        }
        Ok(Agentic {
            seed,
            prefix_tokens: prefix_tokens as usize,
            question_tokens: question_tokens as usize,
            output_tokens,
            max_tokens: spec.max_tokens_sent.unwrap_or(true).then_some(output_tokens),
            turns,
            think_s: needed(spec.think_s, "think_s")?,
            groups: Popularity::new(groups, spec.zipf),
            prefixes: vec![None; groups as usize],
        })
    }

    /// The first turn of the session that a stage begins at a position.
    pub(super) fn begin(&mut self, stage: u64, position: u64) -> Call {
        let session = (stage << SESSIONS_BITS) | position;
        let group = self.groups.draw(&mut stream(self.seed, Stream::Draw, session));
        let prefix = self.prefix(group);
        self.turn(session, 0, group, &[&prefix])
    }

    /// The turn after one that has ended, and the time until it is sent; `None` when that was the
    /// last one.
    pub(super) fn next_turn(&self, ended: &Call) -> Option<(f64, Call)> {
        let session = ended.session?;
        let turn = ended.prompt_id.checked_sub(session * self.turns)? + 1;
        if turn >= self.turns {
            return None;
        }
        let think = exponential(&mut stream(self.seed, Stream::Think, ended.prompt_id));
        let said = [&ended.tokens[..], &ended.output[..]];
        Some((think * self.think_s, self.turn(session, turn, ended.group, &said)))
    }

    fn turn(&self, session: u64, turn: u64, group: u32, said: &[&[u32]]) -> Call {
        let prompt_id = session * self.turns + turn;
        let mut rng = stream(self.seed, Stream::Question, prompt_id);
        let length: usize = said.iter().map(|part| part.len()).sum();
        let mut tokens = Vec::with_capacity(length + self.question_tokens);
        said.iter().for_each(|part| tokens.extend_from_slice(part));
        push_tokens(&mut tokens, self.question_tokens, &mut rng);
        let mut output = Vec::new();
        if turn + 1 < self.turns {
            push_tokens(&mut output, self.output_tokens as usize, &mut rng);
        }
        Call {
            prompt_id,
            tokens: tokens.into(),
            output_tokens: self.output_tokens,
            output: output.into(),
            max_tokens: self.max_tokens,
            group,
            session: Some(session),
        }
    }

    fn prefix(&mut self, group: u32) -> Arc<[u32]> {
        let (seed, length) = (self.seed, self.prefix_tokens);
        let make = || {
            let mut tokens = Vec::new();
            push_tokens(&mut tokens, length, &mut stream(seed, Stream::Prefix, group.into()));
            tokens.into()
        };
        self.prefixes[group as usize].get_or_insert_with(make).clone()
    }
}
