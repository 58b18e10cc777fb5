//! Profiles: which there are, and which stages each has.

use super::build::{Builder, error, is_stage};
use super::{NoteKind, PlanError, ProfilePlan, StagePlan};
use crate::config::{ProfileEntry, ProfilePlugin};
use crate::fleet::Name;
use crate::plugin::{PluginKind, PluginSpec, Role};

impl Builder<'_> {
    /// The configured profiles, or one of every plugin that can run in one.
    pub fn profile_entries(&mut self) -> Result<Vec<ProfileEntry>, PlanError> {
        let entries = match self.config.scheduling_profiles.as_slice() {
            [] => {
                self.note(NoteKind::Added, "profile default: of every filter, scorer and picker");
                let stages = self.plugins.iter().filter(|(_, spec)| is_stage(spec));
                let plugins = stages
                    .map(|(name, _)| ProfilePlugin { plugin_ref: name.to_string(), weight: None });
                vec![ProfileEntry { name: "default".into(), plugins: plugins.collect() }]
            }
            entries => entries.to_vec(),
        };
        for (at, entry) in entries.iter().enumerate() {
            let path = format!("schedulingProfiles[{at}].name");
            if entry.name.is_empty() {
                return Err(error(path, "the profile is missing a `name`"));
            }
            if entries[..at].iter().any(|other| other.name == entry.name) {
                let message = format!("duplicate name '{}'; another profile has it", entry.name);
                return Err(error(path, message));
            }
        }
        Ok(entries)
    }

    /// One profile: each plugin in every role that it has.
    pub fn profile(&mut self, at: usize, entry: &ProfileEntry) -> Result<ProfilePlan, PlanError> {
        let (mut filters, mut scorers, mut pickers) = (Vec::new(), Vec::new(), Vec::new());
        for (index, plugin) in entry.plugins.iter().enumerate() {
            let path = format!("schedulingProfiles[{at}].plugins[{index}]");
            if plugin.plugin_ref.is_empty() {
                let message = "the entry is missing a `pluginRef`, the name of one of `plugins`";
                return Err(error(path, message));
            }
            let name = Name::from(plugin.plugin_ref.as_str());
            self.add_if_default(name.as_str());
            let Some(spec) = self.spec(name.as_str()).cloned() else {
                return Err(self.undefined(format!("{path}.pluginRef"), name.as_str()));
            };
            let kind = spec.kind();
            if let Some(weight) = plugin.weight {
                check_weight(&path, &name, kind, weight)?;
            }
            if !is_stage(&spec) {
                let profile = &entry.name;
                let text = format!(
                    "{name}: does nothing in profile {profile}, it is neither filter, scorer nor \
                     picker"
                );
                self.note(NoteKind::Inert, text);
            }
            let weight = plugin.weight.unwrap_or(1.0);
            let stage = StagePlan { weight, ..StagePlan::new(name, spec) };
            for role in kind.roles() {
                match role {
                    Role::Filter => filters.push(stage.clone()),
                    Role::Scorer => scorers.push(stage.clone()),
                    Role::Picker => pickers.push((index, stage.clone())),
                    _ => {}
                }
            }
        }
        let picker = self.picker(&format!("schedulingProfiles[{at}]"), &entry.name, pickers)?;
        Ok(ProfilePlan { name: Name::from(entry.name.as_str()), filters, scorers, picker })
    }

    /// A profile may name what would be added anyway.
    fn add_if_default(&mut self, name: &str) {
        let spec = match name {
            "max-score-picker" if self.of_role(Role::Picker).next().is_none() => {
                PluginSpec::MaxScorePicker(crate::pick::MaxScore::default())
            }
            "utilization-detector" => {
                PluginSpec::UtilizationDetector(crate::detect::Utilization::default())
            }
            _ => return,
        };
        if self.spec(name).is_none() {
            self.add(spec, "a profile names it");
        }
    }

    fn picker(
        &mut self,
        path: &str,
        profile: &str,
        pickers: Vec<(usize, StagePlan)>,
    ) -> Result<StagePlan, PlanError> {
        let mut pickers = pickers.into_iter();
        match (pickers.next(), pickers.next()) {
            (Some((_, one)), None) => Ok(one),
            (Some((_, one)), Some((at, two))) => {
                let (one, two) = (one.name, two.name);
                let message = format!(
                    "failed to set '{two}' as picker, already have a picker '{one}'; a \
                             profile has one"
                );
                // A profile that was made of all plugins has no place of its own.
                let path = match self.config.scheduling_profiles.is_empty() {
                    true => "plugins".to_owned(),
                    false => format!("{path}.plugins[{at}].pluginRef"),
                };
                Err(error(path, message))
            }
            (None, _) => {
                let configured = self.of_role(Role::Picker).next().cloned();
                let (name, spec) = match configured {
                    Some((name, spec)) => {
                        let text = format!("{name}: profile {profile} names no picker");
                        self.note(NoteKind::Added, text);
                        (name, spec)
                    }
                    None => {
                        let spec = PluginSpec::MaxScorePicker(crate::pick::MaxScore::default());
                        (self.add(spec.clone(), "the profile has no picker"), spec)
                    }
                };
                Ok(StagePlan::new(name, spec))
            }
        }
    }
}

fn check_weight(path: &str, name: &Name, kind: PluginKind, weight: f64) -> Result<(), PlanError> {
    let path = format!("{path}.weight");
    if !kind.is(Role::Scorer) {
        return Err(error(
            path,
            format!("{name} is no scorer, it has no weight; leave the weight out"),
        ));
    }
    if !weight.is_finite() || weight < 0.0 {
        let message = format!("a weight is a number of 0 or more, not {weight}");
        return Err(error(path, message));
    }
    Ok(())
}
