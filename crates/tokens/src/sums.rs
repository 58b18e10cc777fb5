//! Can a template print strings one by one that it would only join to print them?
//!
//! `{{ 'a' + b + 'c' }}` copies the strings twice for each `+`, which for long messages is most of
//! what rendering costs. The same is printed by `{{ 'a' }}{{ b }}{{ 'c' }}`, if all of them are
//! strings. [`in_parts`] rewrites such expressions so that anything else is an error; whoever gets
//! one renders the template as it was, whose answer is the one that counts.

use minijinja::machinery::{Span, Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};

/// Passes strings through, and nothing else.
const FILTER: &str = "kvroute_string";

/// Adds the filter that rewritten templates use.
pub(crate) fn install(env: &mut Environment<'_>) {
    env.add_filter(FILTER, |value: &Value| match value.as_str() {
        Some(_) => Ok(value.clone()),
        None => Err(Error::new(ErrorKind::InvalidOperation, "not a string")),
    });
}

/// The template with sums of strings printed in parts; `None` if there are none.
pub(crate) fn in_parts(source: &str, syntax: SyntaxConfig) -> Option<String> {
    let mut out = String::with_capacity(source.len() * 2);
    let mut copied = 0;
    let mut inside: Option<Vec<(Token<'_>, Span)>> = None;
    for token in tokenize(source, false, syntax) {
        let (token, span) = token.ok()?;
        match (token, &mut inside) {
            (Token::VariableStart, _) => inside = Some(Vec::new()),
            (Token::VariableEnd, tokens) => {
                for (at, end, operand) in tokens.take().and_then(|t| operands(&t, source))? {
                    out.push_str(source.get(copied..at)?);
                    out.push_str(&operand);
                    copied = end;
                }
            }
            (token, Some(tokens)) => tokens.push((token, span)),
            _ => {}
        }
    }
    if copied == 0 {
        return None;
    }
    out.push_str(source.get(copied..)?);
    Some(out)
}

/// What stands in the place of which bytes of the source, for an expression that is a sum with a
/// string in it; nothing for any other one, `None` for one that is not where its tokens say.
fn operands(tokens: &[(Token<'_>, Span)], source: &str) -> Option<Vec<(usize, usize, String)>> {
    let mut depth = 0_usize;
    let mut sums = vec![Vec::new()];
    for (token, span) in tokens {
        let is_simple = match token {
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => {
                depth += 1;
                true
            }
            Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                depth = depth.checked_sub(1)?;
                true
            }
            Token::Str(_) | Token::String(_) | Token::Dot | Token::Pipe | Token::Int(_) => true,
            Token::Ident(name) => !KEYWORDS.contains(name),
            Token::Plus => true,
            _ => false,
        };
        // Without other operators outside of brackets, a sum is taken from left to right.
        if depth == 0 && !is_simple {
            return Some(Vec::new());
        }
        match (depth, token) {
            (0, Token::Plus) => sums.push(Vec::new()),
            _ => sums.last_mut()?.push((token, span)),
        }
    }
    let is_string = |operand: &[(&Token<'_>, &Span)]| {
        matches!(operand, [(Token::Str(_) | Token::String(_), _)])
    };
    let is_sum = sums.len() > 1 && sums.iter().any(|operand| is_string(operand));
    if !is_sum || sums.iter().any(Vec::is_empty) {
        return Some(Vec::new());
    }
    let mut found = Vec::new();
    let mut copied = None;
    for operand in &sums {
        let (first, last) = (operand.first()?.1, operand.last()?.1);
        let (at, end) = (first.start_offset as usize, last.end_offset as usize);
        let text = source.get(at..end)?;
        let printed = match is_string(operand) {
            true => text.to_owned(),
            false => format!("({text})|{FILTER}"),
        };
        let between = if copied.is_some() { "}}{{" } else { "" };
        found.push((copied.unwrap_or(at), end, format!("{between}{printed}")));
        copied = Some(end);
    }
    // `at` of the first is where the expression begins; the others replace what is between.
    Some(found)
}

/// Words that are operators.
const KEYWORDS: [&str; 8] = ["if", "else", "and", "or", "not", "is", "in", "recursive"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_strings_are_printed_in_parts() {
        let table = [
            ("{{ 'a' + b.c }}", Some("{{ 'a'}}{{(b.c)|kvroute_string }}")),
            (
                "x {{- a['k+'] + '\\n' + (b + 'c')|trim -}} y {{ z }}",
                Some(
                    "x {{- (a['k+'])|kvroute_string}}{{'\\n'}}{{((b + 'c')|trim)|kvroute_string \
                     -}} y {{ z }}",
                ),
            ),
            ("{%- set x = 'a' + b %}{{ x }}", None),
            ("{{ 'a' + b if c else d }}", None),
            ("{{ 'a' + b == c }}", None),
            ("{{ 'a' + b ~ c }}", None),
            ("{{ 'a' + b * 2 }}", None),
            ("{{ a + b }}", None),
            ("{{ f('a' + b) }}", None),
            ("{{ 'a' + }}", None),
            ("{{ 'a' + b", None),
            ("é {{ 'é' + b }}", Some("é {{ 'é'}}{{(b)|kvroute_string }}")),
            ("{# {{ 'a' + b }} #}{% raw %}{{ 'a' + b }}{% endraw %}", None),
        ];
        for (source, want) in table {
            assert_eq!(in_parts(source, SyntaxConfig::default()).as_deref(), want, "{source}");
        }
    }
}
