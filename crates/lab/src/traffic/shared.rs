//! Groups that share a prefix; within each, users who repeat a question.

use std::sync::Arc;

use super::popularity::Popularity;
use super::{Call, KEPT_PROMPTS_MAX, KEPT_TOKENS_MAX, PROMPT_TOKENS_MAX, Stream, TrafficError};
use super::{needed, push_tokens, stream};
use crate::scenario::{PromptOrder, WorkloadSpec};

/// The prompts of a shared-prefix workload; each is made when it is first asked for, and kept.
#[derive(Debug)]
pub(super) struct SharedPrefix {
    seed: u64,
    users: u64,
    prefix_tokens: usize,
    question_tokens: usize,
    output_tokens: u32,
    max_tokens: Option<u32>,
    prompts: Vec<Option<Arc<[u32]>>>,
    order: Order,
}

#[derive(Debug)]
enum Order {
    Cyclic(Vec<u32>),
    Random(Popularity),
}

impl SharedPrefix {
    pub(super) fn new(spec: &WorkloadSpec, seed: u64) -> Result<SharedPrefix, TrafficError> {
        let groups = needed(spec.groups, "groups")?;
        let users = needed(spec.users, "users")?;
        let prefix_tokens = needed(spec.prefix_tokens, "prefix_tokens")?;
        let question_tokens = needed(spec.question_tokens, "question_tokens")?;
        let output_tokens = needed(spec.output_tokens, "output_tokens")?;
        let prompts = u64::from(groups) * u64::from(users);
        let length = u64::from(prefix_tokens) + u64::from(question_tokens);
        if prompts == 0 || length == 0 || output_tokens == 0 {
            let message = "groups, users, output_tokens and the length of a prompt must be above 0";
            return Err(TrafficError::Size(message.into()));
        }
        let kept = prompts.saturating_mul(length);
        if length > PROMPT_TOKENS_MAX || kept > KEPT_TOKENS_MAX || prompts > KEPT_PROMPTS_MAX {
            return Err(TrafficError::Size(format!(
                "{groups} groups x {users} users x {length} tokens do not fit in memory: at most \
                 {PROMPT_TOKENS_MAX} tokens in a prompt, {KEPT_PROMPTS_MAX} prompts and \
                 {KEPT_TOKENS_MAX} tokens in all of them"
            )));
        }
        let order = match spec.order.unwrap_or_default() {
            PromptOrder::Random => Order::Random(Popularity::new(groups, spec.zipf)),
            PromptOrder::Cyclic => {
                let mut order: Vec<u32> = (0..prompts as u32).collect();
                stream(seed, Stream::Order, 0).shuffle(&mut order);
                Order::Cyclic(order)
            }
        };
        Ok(SharedPrefix {
            seed,
            users: u64::from(users),
            prefix_tokens: prefix_tokens as usize,
            question_tokens: question_tokens as usize,
            output_tokens,
            max_tokens: spec.max_tokens_sent.unwrap_or(true).then_some(output_tokens),
            prompts: vec![None; prompts as usize],
            order,
        })
    }

    /// Length of every prompt with its answer.
    pub(super) fn request_tokens(&self) -> u64 {
        (self.prefix_tokens + self.question_tokens) as u64 + u64::from(self.output_tokens)
    }

    /// The request at a position of a stage.
    pub(super) fn call(&mut self, stage: u64, position: u64) -> Call {
        let id = match &self.order {
            Order::Cyclic(order) => u64::from(order[(position % order.len() as u64) as usize]),
            Order::Random(popularity) => {
                let mut rng = stream(self.seed, Stream::Draw, (stage << 40) | position);
                let group = popularity.draw(&mut rng);
                u64::from(group) * self.users + rng.below(self.users as usize) as u64
            }
        };
        let tokens = match &self.prompts[id as usize] {
            Some(tokens) => tokens.clone(),
            None => {
                let tokens = self.prompt(id);
                self.prompts[id as usize] = Some(tokens.clone());
                tokens
            }
        };
        Call {
            prompt_id: id,
            tokens,
            output_tokens: self.output_tokens,
            output: Arc::default(),
            max_tokens: self.max_tokens,
            group: (id / self.users) as u32,
            session: None,
        }
    }

    fn prompt(&self, id: u64) -> Arc<[u32]> {
        let mut tokens = Vec::with_capacity(self.prefix_tokens + self.question_tokens);
        let mut prefix = stream(self.seed, Stream::Prefix, id / self.users);
        push_tokens(&mut tokens, self.prefix_tokens, &mut prefix);
        let mut question = stream(self.seed, Stream::Question, id);
        push_tokens(&mut tokens, self.question_tokens, &mut question);
        tokens.into()
    }
}
