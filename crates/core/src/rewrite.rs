//! Which model serves a request that asked for another name?
//!
//! The rules have the semantics of llm-d's InferenceModelRewrite objects.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::Rng;

/// Largest weight of a target.
pub const WEIGHT_MAX: u32 = 1_000_000;

/// A rule by which requests for some models are served by others, as an InferenceModelRewrite has
/// it in Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelRewrite {
    /// Name of the rule in metrics.
    pub name: String,
    /// The models that requests name. Without any, the rule is for all requests that no other rule
    /// names exactly, also for those that name no model.
    #[serde(default)]
    pub matches: Vec<ModelMatch>,
    /// The models that serve them, at least one; one is drawn for each request.
    pub targets: Vec<RewriteTarget>,
}

impl ModelRewrite {
    /// The models that the rule names, as requests do and as engines do.
    pub fn models(&self) -> impl Iterator<Item = &str> {
        let matched = self.matches.iter().map(|one| one.model.as_str());
        matched.chain(self.targets.iter().map(|target| target.model.as_str()))
    }
}

/// A model that requests name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelMatch {
    /// Its name, exactly as requests write it.
    pub model: String,
}

/// A model that serves requests.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RewriteTarget {
    /// The name by which engines serve it.
    pub model: String,
    /// Share of the requests, relative to the other targets of the rule; 1 to 1000000. Where some
    /// targets have a weight, those without one are never drawn; where none has, all are drawn
    /// alike.
    #[serde(default)]
    pub weight: Option<u32>,
}

/// What is wrong with rules: the place below the list, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewriteFault {
    /// Such as `[0].targets[1].weight`.
    pub path: String,
    /// What is wrong and what to write.
    pub message: &'static str,
}

/// Rules, ready to be asked.
#[derive(Clone, Debug, Default)]
pub struct Rewrites {
    rules: Vec<ModelRewrite>,
    /// The rule of each model that one names exactly.
    exact: BTreeMap<String, usize>,
    /// The rule for all other models.
    generic: Option<usize>,
}

/// What the rules say about one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewritten<'a> {
    /// Name of the rule.
    pub rule: &'a str,
    /// The model that serves the request; may be the one that it named.
    pub model: &'a str,
}

impl Rewrites {
    /// Rules in the order in which they win over each other: of several that fit a request equally
    /// well the first counts, as the oldest object does in Kubernetes.
    pub fn new(rules: Vec<ModelRewrite>) -> Rewrites {
        let mut exact = BTreeMap::new();
        let mut generic = None;
        for (at, rule) in rules.iter().enumerate() {
            if rule.matches.is_empty() {
                generic = generic.or(Some(at));
            }
            for ModelMatch { model } in &rule.matches {
                exact.entry(model.clone()).or_insert(at);
            }
        }
        Rewrites { rules, exact, generic }
    }

    /// Whether there are no rules.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The model that serves a request for `model` (empty: it names none); `None` when no rule is
    /// for it. A rule that names the model beats one without matches. Takes a random number only
    /// where a rule has several targets.
    pub fn choose(&self, model: &str, rng: &mut Rng) -> Option<Rewritten<'_>> {
        let at = self.exact.get(model).copied().or(self.generic)?;
        let rule = self.rules.get(at)?;
        let target = draw(&rule.targets, rng)?;
        Some(Rewritten { rule: &rule.name, model: &target.model })
    }
}

fn draw<'a>(targets: &'a [RewriteTarget], rng: &mut Rng) -> Option<&'a RewriteTarget> {
    if let [only] = targets {
        return Some(only);
    }
    let weight = |target: &RewriteTarget| target.weight.unwrap_or(0) as usize;
    let total: usize = targets.iter().map(weight).sum();
    if total == 0 {
        return targets.get(rng.below(targets.len()));
    }
    let mut left = rng.below(total);
    targets.iter().find(|target| match left.checked_sub(weight(target)) {
        None => true,
        Some(rest) => {
            left = rest;
            false
        }
    })
}

/// Checks rules as they are written.
///
/// # Errors
/// The first [`RewriteFault`].
pub fn check(rules: &[ModelRewrite]) -> Result<(), RewriteFault> {
    for (at, rule) in rules.iter().enumerate() {
        let fault =
            |field: String, message| Err(RewriteFault { path: format!("[{at}].{field}"), message });
        if rule.name.is_empty() {
            return fault("name".into(), "must not be empty: metrics name the rule by it");
        }
        if let Some(wrong) = rule.matches.iter().position(|m| m.model.is_empty()) {
            let message = "must not be empty; a rule for all requests has no `matches`";
            return fault(format!("matches[{wrong}].model"), message);
        }
        if rule.targets.is_empty() {
            return fault("targets".into(), "a rule needs at least one target");
        }
        for (number, target) in rule.targets.iter().enumerate() {
            if target.model.is_empty() {
                return fault(format!("targets[{number}].model"), "must name a model");
            }
            if target.weight.is_some_and(|weight| !(1..=WEIGHT_MAX).contains(&weight)) {
                let message = "must be from 1 to 1000000; leave a target out that gets nothing";
                return fault(format!("targets[{number}].weight"), message);
            }
        }
    }
    Ok(())
}

/// What in rules has no effect, one sentence each.
pub fn remarks(rules: &[ModelRewrite]) -> Vec<String> {
    let Rewrites { exact, generic, .. } = Rewrites::new(rules.to_vec());
    let mut remarks = Vec::new();
    for (at, ModelRewrite { name, matches, targets }) in rules.iter().enumerate() {
        if matches.is_empty() && generic != Some(at) {
            remarks.push(format!("{name}: never used, an earlier rule is for all requests, too"));
        }
        for ModelMatch { model } in matches {
            if exact.get(model) != Some(&at) {
                remarks.push(format!("{name}: not used for {model}, an earlier rule names it"));
            }
        }
        if targets.iter().any(|target| target.weight.is_some()) {
            for target in targets.iter().filter(|target| target.weight.is_none()) {
                let model = &target.model;
                remarks.push(format!(
                    "{name}: target {model} is never drawn, because it has no weight and others do"
                ));
            }
        }
    }
    remarks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(yaml: &str) -> Vec<ModelRewrite> {
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn chosen(yaml: &str, model: &str) -> Option<(String, String)> {
        let rewrites = Rewrites::new(rules(yaml));
        let found = rewrites.choose(model, &mut Rng::seeded(1))?;
        Some((found.rule.to_owned(), found.model.to_owned()))
    }

    #[test]
    fn who_wins() {
        let generic = "{name: all, targets: [{model: any}]}";
        let other = "{name: all-2, targets: [{model: other}]}";
        let exact = "{name: a-1, matches: [{model: a}, {model: b}], targets: [{model: x}]}";
        let later = "{name: a-2, matches: [{model: c}, {model: a}], targets: [{model: y}]}";
        type Row<'a> = (&'a [&'a str], &'a str, Option<(&'a str, &'a str)>);
        let table: &[Row<'_>] = &[
            (&[], "a", None),
            (&[exact], "a", Some(("a-1", "x"))),
            (&[exact], "b", Some(("a-1", "x"))),
            (&[exact], "A", None),
            (&[exact], "", None),
            (&[generic], "anything", Some(("all", "any"))),
            (&[generic], "", Some(("all", "any"))),
            (&[generic, exact], "a", Some(("a-1", "x"))),
            (&[generic, exact], "c", Some(("all", "any"))),
            (&[generic, other], "c", Some(("all", "any"))),
            (&[other, generic], "c", Some(("all-2", "other"))),
            (&[exact, later], "a", Some(("a-1", "x"))),
            (&[later, exact], "a", Some(("a-2", "y"))),
            (&[later, exact], "b", Some(("a-1", "x"))),
        ];
        for (list, model, expected) in table {
            let found = chosen(&format!("[{}]", list.join(",")), model);
            let found = found.as_ref().map(|(rule, model)| (rule.as_str(), model.as_str()));
            assert_eq!(found, *expected, "{model} under {list:?}");
        }
    }

    #[test]
    fn targets_are_drawn_by_weight() {
        let table: &[(&str, &[f64])] = &[
            ("[{model: t0}]", &[1.0]),
            ("[{model: t0, weight: 7}]", &[1.0]),
            ("[{model: t0}, {model: t1}]", &[0.5, 0.5]),
            ("[{model: t0}, {model: t1}, {model: t2}, {model: t3}]", &[0.25; 4]),
            ("[{model: t0, weight: 9}, {model: t1, weight: 1}]", &[0.9, 0.1]),
            ("[{model: t0}, {model: t1, weight: 3}, {model: t2, weight: 1}]", &[0.0, 0.75, 0.25]),
            ("[{model: t0, weight: 1000000}, {model: t1}]", &[1.0, 0.0]),
        ];
        const DRAWS: usize = 20_000;
        for (targets, shares) in table {
            let rewrites = Rewrites::new(rules(&format!("[{{name: r, targets: {targets}}}]")));
            let mut rng = Rng::seeded(42);
            let mut counts = vec![0; shares.len()];
            for _ in 0..DRAWS {
                let model = rewrites.choose("m", &mut rng).unwrap().model;
                counts[model[1..].parse::<usize>().unwrap()] += 1;
            }
            for (count, share) in counts.iter().zip(*shares) {
                let seen = f64::from(*count) / DRAWS as f64;
                assert!((seen - share).abs() < 0.02, "{targets}: {counts:?}");
                assert!(*share > 0.0 || *count == 0, "{targets}: {counts:?}");
            }
        }
    }

    #[test]
    fn one_target_takes_no_random_number() {
        let rewrites = Rewrites::new(rules("[{name: r, targets: [{model: t}]}]"));
        let mut rng = Rng::seeded(3);
        assert!(rewrites.choose("m", &mut rng).is_some());
        assert_eq!(rng.next_u64(), Rng::seeded(3).next_u64());
    }

    #[test]
    fn faults_have_a_place() {
        let table = [
            ("[{name: r, targets: [{model: t}]}, {name: '', targets: [{model: t}]}]", "[1].name"),
            ("[{name: r, targets: []}]", "[0].targets"),
            ("[{name: r, targets: [{model: t}, {model: ''}]}]", "[0].targets[1].model"),
            ("[{name: r, targets: [{model: t, weight: 0}]}]", "[0].targets[0].weight"),
            ("[{name: r, targets: [{model: t, weight: 1000001}]}]", "[0].targets[0].weight"),
            ("[{name: r, matches: [{model: ''}], targets: [{model: t}]}]", "[0].matches[0].model"),
        ];
        for (yaml, path) in table {
            assert_eq!(check(&rules(yaml)).unwrap_err().path, path, "{yaml}");
        }
        let right = "[{name: r, targets: [{model: t, weight: 1}, {model: u, weight: 1000000}]}]";
        assert_eq!(check(&rules(right)), Ok(()));
        assert!(remarks(&rules(right)).is_empty());
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let yaml = "
- {name: one, matches: [{model: a}], targets: [{model: t}, {model: u, weight: 2}]}
- {name: all, targets: [{model: t}]}
- {name: two, matches: [{model: a}, {model: b}], targets: [{model: t}]}
- {name: rest, targets: [{model: t}]}
";
        assert_eq!(
            remarks(&rules(yaml)),
            [
                "one: target t is never drawn, because it has no weight and others do",
                "two: not used for a, an earlier rule names it",
                "rest: never used, an earlier rule is for all requests, too",
            ]
        );
    }
}
