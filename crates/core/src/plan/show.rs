//! The plan in words, for people.

use std::fmt;

use crate::handle::Decider;

use super::{HandlerPlan, NoteKind, Plan, ProducerKind, StagePlan, TokensNeed};

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(handler) = self.handler_in_words() {
            writeln!(f, "handler {handler}")?;
        }
        for stage in &self.screeners {
            writeln!(f, "screener {}", stage.name)?;
        }
        for stage in &self.admitters {
            writeln!(f, "admitter {}", stage.name)?;
        }
        for profile in &self.profiles {
            writeln!(f, "profile {}", profile.name)?;
            for stage in &profile.filters {
                writeln!(f, "  filter  {}{}", stage.name, self.reads(stage))?;
            }
            for stage in &profile.scorers {
                let (name, weight, reads) = (&stage.name, stage.weight, self.reads(stage));
                writeln!(f, "  scorer  {name} x {weight}{reads}")?;
            }
            writeln!(f, "  picker  {}", profile.picker.name)?;
        }
        for producer in &self.producers {
            let kind = match producer.kind {
                ProducerKind::Approx(_) => "approximate, from routing history",
                ProducerKind::Precise(_) => "precise, from engine events",
                ProducerKind::Burst(_) => "of the requests that arrive together",
            };
            writeln!(f, "prefix knowledge {}: {kind}", producer.name)?;
        }
        let tokens = match self.tokens {
            TokensNeed::None => "not needed",
            TokensNeed::Estimated => "estimated, four bytes each",
            TokensNeed::Exact => "exact; estimated where there is no tokenizer",
        };
        writeln!(f, "tokens {tokens}")?;
        for note in &self.notes {
            let kind = match note.kind {
                NoteKind::Added => "added",
                NoteKind::Inert => "inert",
                NoteKind::Warning => "warning",
            };
            writeln!(f, "{kind}: {}", note.text)?;
        }
        Ok(())
    }
}

impl Plan {
    /// Nothing to say about a single profile.
    fn handler_in_words(&self) -> Option<String> {
        let name = |at: usize| &self.profiles[at].name;
        Some(match &self.handler {
            HandlerPlan::Single => return None,
            HandlerPlan::Header { header, default } => {
                format!("the profile that header {header} names, else {default}")
            }
            HandlerPlan::DataParallel { primary_port } => {
                format!("requests go to port {primary_port}, the rank stands in a header")
            }
            HandlerPlan::Disagg(disagg) => {
                let decider = |decider: &Decider| match decider {
                    Decider::PrefixBased(by) if by.non_cached_tokens == 0 => {
                        "never: nonCachedTokens is 0".to_owned()
                    }
                    Decider::PrefixBased(by) => {
                        format!("if {} tokens or more are not cached", by.non_cached_tokens)
                    }
                    Decider::Always => "always".to_owned(),
                    Decider::Multimodal => "if there are images, audio or video".to_owned(),
                };
                let mut steps = Vec::new();
                if let Some((at, by)) = &disagg.encode {
                    steps.push(format!("encode by {} ({})", name(*at), decider(by)));
                }
                if let Some((at, by)) = &disagg.prefill {
                    let when = by.as_ref().map_or("always".to_owned(), decider);
                    steps.push(format!("prefill by {} ({when})", name(*at)));
                }
                steps.push(format!("decode by {}", name(disagg.decode)));
                steps.join(", ")
            }
        })
    }

    fn reads(&self, stage: &StagePlan) -> String {
        match stage.prefix.and_then(|at| self.producers.get(at)) {
            Some(producer) => format!(" (reads {})", producer.name),
            None => String::new(),
        }
    }
}
