//! `request-attribute-reporter`: a number computed from a request's usage, for the proxy's
//! dynamic metadata.

use schemars::JsonSchema;
use serde::Deserialize;

use super::expression::{EvaluationError, Expression, Value};
use crate::stage::Plugin;

const NAMESPACE: &str = "envoy.lb";

/// Parameters of `request-attribute-reporter`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct AttributeReporter {
    /// What is reported: exactly one entry.
    pub attributes: Vec<Attribute>,
}

/// One number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Attribute {
    /// Where it goes.
    pub key: AttributeKey,
    /// How it is computed: a CEL expression over `usage.prompt_tokens`,
    /// `usage.completion_tokens`, `usage.total_tokens` and
    /// `usage.prompt_tokens_details.cached_tokens`, with arithmetic, comparison, `&&`, `||`, `!`,
    /// `?:`, `has()`, `int()` and `double()`. Fractions are cut off; 0 is not reported. Required.
    pub expression: String,
    /// Reported only if this expression is true.
    pub condition: Option<String>,
}

/// A place in the dynamic metadata.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct AttributeKey {
    /// The namespace.
    pub namespace: String,
    /// The key in it. Required.
    pub name: String,
}

impl Default for AttributeKey {
    fn default() -> AttributeKey {
        AttributeKey { namespace: NAMESPACE.into(), name: String::new() }
    }
}

/// What an engine reported about a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportUsage {
    /// Of all prompts.
    pub prompt_tokens: u32,
    /// Generated.
    pub completion_tokens: u32,
    /// Of the prompt, from the engine's cache; `None`: the engine does not tell.
    pub cached_tokens: Option<u32>,
}

/// A number for the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Namespace of the dynamic metadata.
    pub namespace: String,
    /// Key in it.
    pub name: String,
    /// The value.
    pub value: i64,
}

/// A reporter that is ready to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Reporter {
    key: AttributeKey,
    expression: Expression,
    condition: Option<Expression>,
}

impl AttributeReporter {
    /// Reads the expressions. `Err`: what is wrong with the parameters, the field first.
    pub fn compile(&self) -> Result<Reporter, String> {
        let [attribute] = self.attributes.as_slice() else {
            let count = self.attributes.len();
            return Err(format!("attributes needs exactly one entry, not {count}"));
        };
        let mut key = attribute.key.clone();
        if key.name.is_empty() {
            return Err("attributes[0].key.name is required".into());
        }
        if key.namespace.is_empty() {
            key.namespace = NAMESPACE.into();
        }
        if attribute.expression.is_empty() {
            return Err("attributes[0].expression is required".into());
        }
        let read = |field: &str, text: &str| {
            Expression::parse(text).map_err(|why| format!("attributes[0].{field}: {why}"))
        };
        let expression = read("expression", &attribute.expression)?;
        let condition = attribute.condition.as_deref().filter(|text| !text.is_empty());
        let condition = condition.map(|text| read("condition", text)).transpose()?;
        Ok(Reporter { key, expression, condition })
    }
}

impl Reporter {
    /// What is reported about a request. `None`: the condition does not hold, or the number is 0.
    pub fn report(&self, usage: &ReportUsage) -> Result<Option<Report>, EvaluationError> {
        let look_up = |path: &[&str]| field(usage, path);
        if let Some(condition) = &self.condition {
            match condition.evaluate(&look_up)? {
                Value::Bool(true) => {}
                Value::Bool(false) => return Ok(None),
                _ => return Err(EvaluationError::NotBool),
            }
        }
        let value = match self.expression.evaluate(&look_up)? {
            Value::Int(value) => value,
            // Cut off, and clamped to what fits.
            Value::Double(value) => value as i64,
            Value::Bool(_) | Value::Map => return Err(EvaluationError::NotNumber),
        };
        let AttributeKey { namespace, name } = self.key.clone();
        Ok((value != 0).then_some(Report { namespace, name, value }))
    }
}

/// A field of `usage`. Its numbers are doubles, as those of JSON are in CEL.
fn field(usage: &ReportUsage, path: &[&str]) -> Option<Value> {
    let number = |tokens: u32| Value::Double(f64::from(tokens));
    Some(match path {
        [] => Value::Map,
        ["prompt_tokens"] => number(usage.prompt_tokens),
        ["completion_tokens"] => number(usage.completion_tokens),
        ["total_tokens"] => number(usage.prompt_tokens.saturating_add(usage.completion_tokens)),
        ["prompt_tokens_details"] => usage.cached_tokens.map(|_| Value::Map)?,
        ["prompt_tokens_details", "cached_tokens"] => number(usage.cached_tokens?),
        _ => return None,
    })
}

impl Plugin for AttributeReporter {
    fn check(&self) -> Result<(), String> {
        self.compile().map(|_| ())
    }

    fn inert(&self) -> Vec<String> {
        let Ok(reporter) = self.compile() else { return Vec::new() };
        let all = ReportUsage { cached_tokens: Some(0), ..ReportUsage::default() };
        let expressions = [Some(&reporter.expression), reporter.condition.as_ref()];
        let paths = expressions.into_iter().flatten().flat_map(Expression::paths);
        let unknown = paths.filter(|path| {
            field(&all, &path.iter().map(String::as_str).collect::<Vec<_>>()).is_none()
        });
        unknown.map(|path| format!("usage.{}: no answer has it", path.join("."))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reporter(expression: &str, condition: Option<&str>) -> AttributeReporter {
        let key = AttributeKey { name: "cost".into(), ..AttributeKey::default() };
        let condition = condition.map(str::to_owned);
        let attribute = Attribute { key, expression: expression.into(), condition };
        AttributeReporter { attributes: vec![attribute] }
    }

    const USAGE: ReportUsage =
        ReportUsage { prompt_tokens: 10, completion_tokens: 7, cached_tokens: Some(4) };

    fn value(expression: &str, condition: Option<&str>) -> Result<Option<i64>, EvaluationError> {
        let reporter = reporter(expression, condition).compile().unwrap();
        Ok(reporter.report(&USAGE)?.map(|report| report.value))
    }

    #[test]
    fn numbers_come_from_the_usage() {
        let table = [
            ("usage.completion_tokens", None, Some(7)),
            ("usage.completion_tokens\n", Some("has(usage.completion_tokens)"), Some(7)),
            ("usage.total_tokens", Some("usage.total_tokens > 16"), Some(17)),
            ("usage.total_tokens", Some("usage.total_tokens > 17"), None),
            ("usage.prompt_tokens + 2.0 * usage.completion_tokens", None, Some(24)),
            ("usage.prompt_tokens_details.cached_tokens / 3", None, Some(1)),
            ("usage.prompt_tokens - 10", None, None),
            ("-usage.prompt_tokens", Some(""), Some(-10)),
            ("has(usage.nothing) ? 1 : 2", None, Some(2)),
        ];
        for (expression, condition, expected) in table {
            assert_eq!(value(expression, condition), Ok(expected), "{expression}");
        }
        assert_eq!(value("usage.prompt_tokens > 1", None), Err(EvaluationError::NotNumber));
        assert_eq!(value("usage", None), Err(EvaluationError::NotNumber));
        assert_eq!(value("1", Some("2")), Err(EvaluationError::NotBool));
        let missing = EvaluationError::Missing("usage.nothing".into());
        assert_eq!(value("usage.nothing", None), Err(missing));
        let silent = ReportUsage { cached_tokens: None, ..USAGE };
        let cached = "has(usage.prompt_tokens_details) && \
                      has(usage.prompt_tokens_details.cached_tokens)";
        let reporter = reporter("1", Some(cached)).compile().unwrap();
        assert_eq!(reporter.report(&silent), Ok(None));
        let report = reporter.report(&USAGE).unwrap().unwrap();
        assert_eq!((report.namespace.as_str(), report.name.as_str()), ("envoy.lb", "cost"));
    }

    #[test]
    fn mistakes_name_their_field() {
        let unnamed = AttributeReporter { attributes: vec![Attribute::default()] };
        let good = reporter("1", None);
        let two = AttributeReporter { attributes: vec![good.attributes[0].clone(); 2] };
        let table = [
            (AttributeReporter::default(), "attributes needs exactly one entry, not 0"),
            (two, "attributes needs exactly one entry, not 2"),
            (unnamed, "attributes[0].key.name is required"),
            (reporter("", None), "attributes[0].expression is required"),
            (reporter("usage.", None), "attributes[0].expression: "),
            (reporter("1", Some("1 +")), "attributes[0].condition: "),
        ];
        for (reporter, message) in table {
            assert!(reporter.check().unwrap_err().starts_with(message), "{message}");
        }
        assert_eq!(good.check(), Ok(()));
        let text = "attributes: [{key: {name: n, namespace: ''}, expression: '1'}]";
        let read: AttributeReporter = serde_saphyr::from_str(text).unwrap();
        assert_eq!(read.compile().unwrap().key.namespace, "envoy.lb");
    }

    #[test]
    fn fields_that_no_answer_has_are_shown() {
        let unknown = reporter("usage.cached + usage.prompt_tokens", Some("has(usage.x.y)"));
        assert_eq!(
            unknown.inert(),
            ["usage.cached: no answer has it", "usage.x.y: no answer has it"]
        );
        let known = reporter("usage.prompt_tokens_details.cached_tokens", None);
        assert!(known.inert().is_empty());
    }
}
