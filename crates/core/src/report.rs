//! What does the proxy in front learn from an answer? One file per reporter.

mod attribute;
mod expression;
mod served;

pub use attribute::{Attribute, AttributeKey, AttributeReporter, Report, ReportUsage, Reporter};
pub use expression::EvaluationError;
pub use served::ServedVerifier;
