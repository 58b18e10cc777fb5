//! Profile handlers: which there is, and whether the profiles suit it.

use super::build::{Builder, error};
use super::{DisaggPlan, HandlerPlan, NoteKind, PlanError, ProfilePlan};
use crate::handle::{Decider, Stages};
use crate::plugin::{PluginSpec, Role, known_names};

impl Builder<'_> {
    /// The one handler, with its profiles found.
    pub fn handler(&mut self, profiles: &[ProfilePlan]) -> Result<HandlerPlan, PlanError> {
        let handlers: Vec<usize> = (0..self.config.plugins.len())
            .filter(|at| self.config.plugins[*at].spec.kind().is(Role::Handler))
            .collect();
        let at = match handlers.as_slice() {
            [] if profiles.len() == 1 => {
                let spec = PluginSpec::SingleProfileHandler(crate::handle::Single::default());
                self.add(spec, "there is one profile");
                return Ok(HandlerPlan::Single);
            }
            [] => {
                let message = format!(
                    "no profile handler configured for {} profiles; add one to `plugins`: \
                     disagg-profile-handler, header-profile-handler",
                    profiles.len()
                );
                return Err(error("schedulingProfiles", message));
            }
            [at] => *at,
            [_, second, ..] => {
                let message = "multiple profile handlers found; there is one for all profiles, \
                               leave the others out";
                return Err(error(format!("plugins[{second}].type"), message));
            }
        };
        let entry = &self.config.plugins[at];
        let path = format!("plugins[{at}].parameters");
        match &entry.spec {
            PluginSpec::HeaderProfileHandler(header) => {
                let default = header.profile_otherwise().to_owned();
                let has = |name| profiles.iter().any(|profile| profile.name.as_str() == name);
                if profiles.len() > 1 && !has(default.as_str()) {
                    if header.names_default() {
                        let path = format!("{path}.defaultProfile");
                        return Err(no_profile(&path, &default, profiles));
                    }
                    let text = format!(
                        "{}.defaultProfile: there is no profile '{default}', so requests without \
                         the header {} are refused",
                        entry.name(),
                        header.header()
                    );
                    self.note(NoteKind::Warning, text);
                }
                Ok(HandlerPlan::Header { header: header.header(), default })
            }
            PluginSpec::DisaggProfileHandler(disagg) => {
                self.disagg(&path, &disagg.stages(), profiles)
            }
            PluginSpec::PdProfileHandler(disagg) => self.disagg(&path, &disagg.stages(), profiles),
            other => {
                if profiles.len() > 1 {
                    let message = format!(
                        "the {} cannot support multiple scheduling profiles; keep one, or use \
                         disagg-profile-handler",
                        entry.written()
                    );
                    return Err(error("schedulingProfiles[1]", message));
                }
                Ok(match other {
                    PluginSpec::DataParallelProfileHandler(parallel) => {
                        HandlerPlan::DataParallel { primary_port: parallel.primary_port }
                    }
                    _ => HandlerPlan::Single,
                })
            }
        }
    }

    fn disagg(
        &mut self,
        path: &str,
        stages: &Stages<'_>,
        profiles: &[ProfilePlan],
    ) -> Result<HandlerPlan, PlanError> {
        let position = |name: &str| profiles.iter().position(|p| p.name.as_str() == name);
        let Some(decode) = position(stages.decode) else {
            return Err(no_profile(&format!("{path}.profiles.decode"), stages.decode, profiles));
        };
        let decider =
            |named: Option<(&str, &str)>| named.and_then(|(_, name)| self.decider_of(name));
        let (for_prefill, for_encode) =
            (decider(stages.prefill_decider), decider(stages.encode_decider));
        let first = stages.order == crate::handle::StageOrder::PrefillFirst;
        let prefill = position(stages.prefill).filter(|_| first || for_prefill.is_some());
        let encode = position(stages.encode).zip(for_encode);
        for (step, name, decides) in [
            ("prefill", stages.prefill, first || for_prefill.is_some()),
            ("encode", stages.encode, for_encode.is_some()),
        ] {
            match (position(name), decides) {
                (None, true) => {
                    let text = format!("{step}: never runs, there is no profile '{name}'");
                    self.note(NoteKind::Warning, text);
                }
                (Some(_), false) => {
                    let text = format!("profile {name}: never runs, {step} has no decider");
                    self.note(NoteKind::Inert, text);
                }
                _ => {}
            }
        }
        for profile in profiles {
            let name = profile.name.as_str();
            if ![stages.decode, stages.prefill, stages.encode].contains(&name) {
                let text = format!("profile {name}: the handler has no step of that name");
                self.note(NoteKind::Inert, text);
            }
        }
        Ok(HandlerPlan::Disagg(DisaggPlan {
            order: stages.order,
            decode,
            prefill: prefill.map(|at| (at, for_prefill)),
            encode,
            primary_port: Some(stages.primary_port).filter(|port| *port > 0),
        }))
    }

    fn decider_of(&self, name: &str) -> Option<Decider> {
        match self.spec(name)? {
            PluginSpec::PrefixBasedDecider(decider) => Some(Decider::PrefixBased(*decider)),
            PluginSpec::AlwaysDecider(_) => Some(Decider::Always),
            PluginSpec::MultimodalDecider(_) => Some(Decider::Multimodal),
            _ => None,
        }
    }
}

fn no_profile(path: &str, name: &str, profiles: &[ProfilePlan]) -> PlanError {
    let names = known_names(name, profiles.iter().map(|profile| profile.name.as_str()));
    error(path, format!("there is no profile '{name}'; profiles: {names}"))
}
