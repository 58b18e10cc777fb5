//! What does a CEL expression over a request's usage say?
//!
//! The part of the Common Expression Language that such expressions need: fields of `usage`,
//! numbers, `true` and `false`, `+ - * / %`, comparison, `&& || !`, `?:`, brackets, `has`, `int`
//! and `double`. The rest (strings, lists, maps, `in`, macros, other functions) is refused by name.
//! Unlike in CEL, whole numbers and fractions mix in arithmetic: the result is a fraction.

/// Longest expression, bytes.
const EXPRESSION_BYTES_MAX: usize = 4_096;
/// Deepest nesting, which bounds the recursion.
const DEPTH_MAX: u32 = 64;

/// An expression that has been read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Expression(Node);

/// What an expression yields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value {
    /// A whole number.
    Int(i64),
    /// A number.
    Double(f64),
    /// A truth value.
    Bool(bool),
    /// An object with fields.
    Map,
}

/// Why an expression has no value for some request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvaluationError {
    /// A field that the usage does not have.
    #[error("the answer's usage has no {0}; ask with has()")]
    Missing(String),
    /// An operator between values that it is not for.
    #[error("`{0}` is not for such values")]
    Types(&'static str),
    /// Division by zero, or a whole number beyond 64 bits.
    #[error("`{0}` has no result: division by zero, or a number beyond 64 bits")]
    Arithmetic(&'static str),
    /// The condition is not true or false.
    #[error("the condition is neither true nor false")]
    NotBool,
    /// The expression is not a number.
    #[error("the expression is not a number")]
    NotNumber,
}

#[derive(Clone, Debug, PartialEq)]
enum Node {
    Constant(Value),
    /// Field of `usage`; no names: `usage` itself.
    Field(Vec<String>),
    Has(Vec<String>),
    Int(Box<Node>),
    Double(Box<Node>),
    Negative(Box<Node>),
    Not(Box<Node>),
    Binary(Operator, Box<Node>, Box<Node>),
    Choice(Box<(Node, Node, Node)>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Or,
    And,
    Equal,
    NotEqual,
    LessOrEqual,
    GreaterOrEqual,
    Less,
    Greater,
    Plus,
    Minus,
    Times,
    Divide,
    Remainder,
}

use Operator::{
    And, Divide, Equal, Greater, GreaterOrEqual, Less, LessOrEqual, Minus, NotEqual, Or, Plus,
    Remainder, Times,
};

/// From those that bind least to those that bind most.
const LEVELS: [&[Operator]; 5] = [
    &[Or],
    &[And],
    &[Equal, NotEqual, LessOrEqual, GreaterOrEqual, Less, Greater],
    &[Plus, Minus],
    &[Times, Divide, Remainder],
];

impl Operator {
    fn as_str(self) -> &'static str {
        match self {
            Or => "||",
            And => "&&",
            Equal => "==",
            NotEqual => "!=",
            LessOrEqual => "<=",
            GreaterOrEqual => ">=",
            Less => "<",
            Greater => ">",
            Plus => "+",
            Minus => "-",
            Times => "*",
            Divide => "/",
            Remainder => "%",
        }
    }
}

impl Expression {
    /// Reads an expression. `Err`: what is wrong with it, and where.
    pub fn parse(text: &str) -> Result<Expression, String> {
        if text.len() > EXPRESSION_BYTES_MAX {
            return Err(format!("longer than {EXPRESSION_BYTES_MAX} bytes"));
        }
        let mut parser = Parser { text, at: 0, depth: 0 };
        let node = parser.choice()?;
        match parser.rest().chars().next() {
            None => Ok(Expression(node)),
            Some(_) => Err(parser.unexpected("an operator or the end")),
        }
    }

    /// Its value, with the fields of `usage` (by path) from `look_up`.
    pub fn evaluate(
        &self,
        look_up: &dyn Fn(&[&str]) -> Option<Value>,
    ) -> Result<Value, EvaluationError> {
        evaluate(&self.0, look_up)
    }

    /// All fields of `usage` that it names, in order.
    pub fn paths(&self) -> Vec<&[String]> {
        let mut paths = Vec::new();
        collect_paths(&self.0, &mut paths);
        paths
    }
}

fn collect_paths<'a>(node: &'a Node, paths: &mut Vec<&'a [String]>) {
    match node {
        Node::Constant(_) => {}
        Node::Field(path) | Node::Has(path) => paths.push(path),
        Node::Int(of) | Node::Double(of) | Node::Negative(of) | Node::Not(of) => {
            collect_paths(of, paths);
        }
        Node::Binary(_, left, right) => {
            collect_paths(left, paths);
            collect_paths(right, paths);
        }
        Node::Choice(parts) => {
            let (condition, yes, no) = &**parts;
            [condition, yes, no].into_iter().for_each(|part| collect_paths(part, paths));
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
}

impl<'a> Parser<'a> {
    /// What is left, from the next character that is no space.
    fn rest(&mut self) -> &'a str {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let trimmed = rest.trim_start();
        self.at += rest.len() - trimmed.len();
        trimmed
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    fn unexpected(&mut self, expected: &str) -> String {
        let column = self.text[..self.at].chars().count() + 1;
        match self.rest().split_whitespace().next() {
            Some(found) => {
                let found: String = found.chars().take(20).collect();
                format!("`{found}` at column {column}, expected {expected}")
            }
            None => format!("ends at column {column}, expected {expected}"),
        }
    }

    fn choice(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!("nested deeper than {DEPTH_MAX} levels"));
        }
        let condition = self.binary(0)?;
        let node = if self.take("?") {
            let yes = self.binary(0)?;
            if !self.take(":") {
                return Err(self.unexpected("`:`"));
            }
            Node::Choice(Box::new((condition, yes, self.choice()?)))
        } else {
            condition
        };
        self.depth -= 1;
        Ok(node)
    }

    fn binary(&mut self, level: usize) -> Result<Node, String> {
        let Some(operators) = LEVELS.get(level) else { return self.unary() };
        let mut node = self.binary(level + 1)?;
        let mut chained = 0;
        while let Some(operator) = self.operator(operators)? {
            // Each one makes the tree a level deeper, and its evaluation as well.
            chained += 1;
            if chained > DEPTH_MAX {
                return Err(format!("more than {DEPTH_MAX} operators in a row"));
            }
            node = Node::Binary(operator, Box::new(node), Box::new(self.binary(level + 1)?));
        }
        Ok(node)
    }

    fn operator(&mut self, operators: &[Operator]) -> Result<Option<Operator>, String> {
        if operators.contains(&Equal) && self.identifier_is_next("in") {
            return Err("`in` is not supported; ask for a field with has()".into());
        }
        let found = operators.iter().find(|operator| self.take(operator.as_str()));
        Ok(found.copied())
    }

    fn unary(&mut self) -> Result<Node, String> {
        let negative = self.rest().starts_with('-');
        let not = self.rest().starts_with('!');
        if !negative && !not {
            return self.primary();
        }
        self.at += 1;
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(format!("nested deeper than {DEPTH_MAX} levels"));
        }
        let of = Box::new(self.unary()?);
        self.depth -= 1;
        Ok(if negative { Node::Negative(of) } else { Node::Not(of) })
    }

    fn primary(&mut self) -> Result<Node, String> {
        let rest = self.rest();
        match rest.chars().next() {
            Some('(') => {
                self.at += 1;
                let inner = self.choice()?;
                self.close(inner)
            }
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some('"' | '\'') => Err(self.unexpected("a number or a field; no strings here")),
            Some('[' | '{') => Err(self.unexpected("a number or a field; no lists or maps here")),
            Some(_) if !self.identifier().is_empty() => self.named(),
            _ => Err(self.unexpected("a number, a field or `(`")),
        }
    }

    fn close(&mut self, node: Node) -> Result<Node, String> {
        if self.take(")") { Ok(node) } else { Err(self.unexpected("`)`")) }
    }

    /// The identifier that comes next, or nothing; it is not taken.
    fn identifier(&mut self) -> &'a str {
        let rest = self.rest();
        let inside = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let end = rest.find(|c| !inside(c)).unwrap_or(rest.len());
        if rest.starts_with(|c: char| c.is_ascii_digit()) { "" } else { &rest[..end] }
    }

    fn identifier_is_next(&mut self, word: &str) -> bool {
        self.identifier() == word
    }

    fn number(&mut self) -> Result<Node, String> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let mut end = 0;
        while let Some(byte) = bytes.get(end) {
            let exponent_sign =
                matches!(byte, b'+' | b'-') && end > 0 && matches!(bytes[end - 1], b'e' | b'E');
            if !byte.is_ascii_alphanumeric() && *byte != b'.' && !exponent_sign {
                break;
            }
            end += 1;
        }
        let (digits, hexadecimal) = match rest[..end].strip_prefix("0x") {
            Some(digits) => (digits, true),
            None => (&rest[..end], false),
        };
        let whole = i64::from_str_radix(digits, if hexadecimal { 16 } else { 10 });
        let value = match whole {
            Ok(whole) => Value::Int(whole),
            Err(_) if !hexadecimal && digits.contains(['.', 'e', 'E']) => {
                Value::Double(digits.parse().map_err(|_| self.unexpected("a number"))?)
            }
            Err(_) => return Err(self.unexpected("a number of at most 63 bits")),
        };
        self.at += end;
        Ok(Node::Constant(value))
    }

    /// Something that starts with a word.
    fn named(&mut self) -> Result<Node, String> {
        let word = self.identifier();
        let start = self.at;
        self.at += word.len();
        let called = self.rest().starts_with('(');
        match word {
            "true" => Ok(Node::Constant(Value::Bool(true))),
            "false" => Ok(Node::Constant(Value::Bool(false))),
            "usage" => Ok(Node::Field(self.path()?)),
            "has" | "int" | "double" if called => {
                self.at += 1;
                let of = self.choice()?;
                let node = match (word, of) {
                    ("has", Node::Field(path)) if !path.is_empty() => Node::Has(path),
                    ("has", _) => return Err(self.unexpected("a field of `usage` before `)`")),
                    ("int", of) => Node::Int(Box::new(of)),
                    (_, of) => Node::Double(Box::new(of)),
                };
                self.close(node)
            }
            _ if called => {
                self.at = start;
                Err(self.unexpected("one of the functions has, int and double"))
            }
            _ => {
                self.at = start;
                Err(self.unexpected("`usage`, the one variable that there is"))
            }
        }
    }

    /// What follows `usage`: `.name` or `["name"]`, any number of times.
    fn path(&mut self) -> Result<Vec<String>, String> {
        let mut path = Vec::new();
        loop {
            if self.take(".") {
                let name = self.identifier();
                if name.is_empty() {
                    return Err(self.unexpected("the name of a field"));
                }
                self.at += name.len();
                if self.rest().starts_with('(') {
                    self.at -= name.len();
                    return Err(self.unexpected("a field; methods and macros are not supported"));
                }
                path.push(name.to_owned());
            } else if self.take("[") {
                let quoted = ['"', '\''].into_iter().find_map(|quote| {
                    let (name, _) = self.rest().strip_prefix(quote)?.split_once(quote)?;
                    Some(name)
                });
                let Some(name) = quoted.filter(|name| !name.contains('\\')) else {
                    return Err(self.unexpected("a field's name in quotes"));
                };
                self.at += name.len() + 2;
                if !self.take("]") {
                    return Err(self.unexpected("`]`"));
                }
                path.push(name.to_owned());
            } else {
                return Ok(path);
            }
        }
    }
}

type LookUp<'a> = &'a dyn Fn(&[&str]) -> Option<Value>;

fn evaluate(node: &Node, look_up: LookUp<'_>) -> Result<Value, EvaluationError> {
    let find = |path: &[String]| look_up(&path.iter().map(String::as_str).collect::<Vec<_>>());
    Ok(match node {
        Node::Constant(value) => *value,
        Node::Field(path) => {
            let missing = || EvaluationError::Missing(format!("usage.{}", path.join(".")));
            find(path).ok_or_else(missing)?
        }
        Node::Has(path) => Value::Bool(find(path).is_some()),
        Node::Int(of) => match evaluate(of, look_up)? {
            Value::Double(x) if x.is_nan() || x.abs() >= 9_223_372_036_854_775_808.0 => {
                return Err(EvaluationError::Arithmetic("int"));
            }
            Value::Double(x) => Value::Int(x as i64),
            Value::Int(x) => Value::Int(x),
            _ => return Err(EvaluationError::Types("int")),
        },
        Node::Double(of) => match evaluate(of, look_up)? {
            Value::Int(x) => Value::Double(x as f64),
            Value::Double(x) => Value::Double(x),
            _ => return Err(EvaluationError::Types("double")),
        },
        Node::Negative(of) => match evaluate(of, look_up)? {
            Value::Int(x) => Value::Int(x.checked_neg().ok_or(EvaluationError::Arithmetic("-"))?),
            Value::Double(x) => Value::Double(-x),
            _ => return Err(EvaluationError::Types("-")),
        },
        Node::Not(of) => Value::Bool(!truth(evaluate(of, look_up), "!")?),
        Node::Binary(And, left, right) => logic(left, right, look_up, false)?,
        Node::Binary(Or, left, right) => logic(left, right, look_up, true)?,
        Node::Binary(operator, left, right) => {
            binary(*operator, evaluate(left, look_up)?, evaluate(right, look_up)?)?
        }
        Node::Choice(parts) => {
            let (condition, yes, no) = &**parts;
            let branch = if truth(evaluate(condition, look_up), "?:")? { yes } else { no };
            evaluate(branch, look_up)?
        }
    })
}

fn truth(
    value: Result<Value, EvaluationError>,
    operator: &'static str,
) -> Result<bool, EvaluationError> {
    match value? {
        Value::Bool(value) => Ok(value),
        _ => Err(EvaluationError::Types(operator)),
    }
}

/// `&&` and `||`: the side that decides wins, even over an error on the other side (CEL).
fn logic(
    left: &Node,
    right: &Node,
    look_up: LookUp<'_>,
    decides: bool,
) -> Result<Value, EvaluationError> {
    let name = if decides { "||" } else { "&&" };
    let left = truth(evaluate(left, look_up), name);
    if left == Ok(decides) {
        return Ok(Value::Bool(decides));
    }
    let right = truth(evaluate(right, look_up), name);
    if right == Ok(decides) {
        return Ok(Value::Bool(decides));
    }
    left.and(right).map(Value::Bool)
}

fn binary(operator: Operator, left: Value, right: Value) -> Result<Value, EvaluationError> {
    let name = operator.as_str();
    match (left, right) {
        (Value::Int(a), Value::Int(b)) => match integers(operator, a, b) {
            Some(result) => result.map(Value::Int).ok_or(EvaluationError::Arithmetic(name)),
            None => Ok(Value::Bool(ordered(operator, a.partial_cmp(&b)))),
        },
        (Value::Bool(a), Value::Bool(b)) if matches!(operator, Equal | NotEqual) => {
            Ok(Value::Bool((a == b) == (operator == Equal)))
        }
        (Value::Int(_) | Value::Double(_), Value::Int(_) | Value::Double(_)) => {
            let number = |value| if let Value::Int(x) = value { Some(x as f64) } else { None };
            let double = |value| match value {
                Value::Double(x) => Some(x),
                other => number(other),
            };
            let (Some(a), Some(b)) = (double(left), double(right)) else {
                return Err(EvaluationError::Types(name));
            };
            doubles(operator, a, b)
        }
        _ => Err(EvaluationError::Types(name)),
    }
}

/// `None`: a comparison. `Some(None)`: no result.
fn integers(operator: Operator, a: i64, b: i64) -> Option<Option<i64>> {
    Some(match operator {
        Plus => a.checked_add(b),
        Minus => a.checked_sub(b),
        Times => a.checked_mul(b),
        Divide => a.checked_div(b),
        Remainder => a.checked_rem(b),
        _ => return None,
    })
}

fn doubles(operator: Operator, a: f64, b: f64) -> Result<Value, EvaluationError> {
    Ok(match operator {
        Plus => Value::Double(a + b),
        Minus => Value::Double(a - b),
        Times => Value::Double(a * b),
        Divide => Value::Double(a / b),
        // CEL has it for whole numbers only.
        Remainder => return Err(EvaluationError::Types("%")),
        _ => Value::Bool(ordered(operator, a.partial_cmp(&b))),
    })
}

fn ordered(operator: Operator, ordering: Option<std::cmp::Ordering>) -> bool {
    let Some(ordering) = ordering else { return operator == NotEqual };
    match operator {
        Equal => ordering.is_eq(),
        NotEqual => ordering.is_ne(),
        Less => ordering.is_lt(),
        LessOrEqual => ordering.is_le(),
        Greater => ordering.is_gt(),
        GreaterOrEqual => ordering.is_ge(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluated(text: &str) -> Result<Value, EvaluationError> {
        let expression = Expression::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"));
        expression.evaluate(&|path| match path {
            [] => Some(Value::Map),
            ["a"] => Some(Value::Double(6.0)),
            ["b"] => Some(Value::Map),
            ["b", "c"] => Some(Value::Double(2.5)),
            _ => None,
        })
    }

    #[test]
    fn values() {
        use Value::{Bool, Double, Int};
        let table = [
            ("1 + 2 * 3", Int(7)),
            ("(1 + 2) * 3", Int(9)),
            ("7 / 2", Int(3)),
            ("-7 % 4", Int(-3)),
            ("7 / 2.0", Double(3.5)),
            ("10 - 3 - 2", Int(5)),
            ("0x10 + .5", Double(16.5)),
            ("1e3 + 2.5e-1", Double(1_000.25)),
            ("usage.a + usage.b.c", Double(8.5)),
            ("usage['b'][\"c\"] * 2", Double(5.0)),
            ("usage . a / 2", Double(3.0)),
            ("--3", Int(3)),
            ("int(usage.b.c) + 1", Int(3)),
            ("double(3) / 2", Double(1.5)),
            ("usage.a > 5 && usage.a <= 6", Bool(true)),
            ("1 == 1.0", Bool(true)),
            ("1 != 2 || 1 / 0 == 1", Bool(true)),
            ("1 / 0 == 1 || true", Bool(true)),
            ("false && usage.x > 1", Bool(false)),
            ("has(usage.a) && !has(usage.x)", Bool(true)),
            ("!(usage.a < 1) == true", Bool(true)),
            ("usage.a > 5 ? 1 : usage.a > 4 ? 2 : 3", Int(1)),
            ("usage.a < 5 ? 1 : usage.a > 7 ? 2 : 3", Int(3)),
            ("double(0) / 0 == 0", Bool(false)),
            ("double(0) / 0 != 0", Bool(true)),
        ];
        for (text, value) in table {
            assert_eq!(evaluated(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn errors_of_single_requests() {
        use EvaluationError::{Arithmetic, Missing, Types};
        let table = [
            ("usage.x + 1", Missing("usage.x".into())),
            ("usage.b + 1", Types("+")),
            ("true + 1", Types("+")),
            ("1 ? 2 : 3", Types("?:")),
            ("!1", Types("!")),
            ("-true", Types("-")),
            ("usage.a % 2", Types("%")),
            ("true && 1", Types("&&")),
            ("1 / 0", Arithmetic("/")),
            ("9223372036854775807 + 1", Arithmetic("+")),
            ("int(1e30)", Arithmetic("int")),
            ("int(true)", Types("int")),
            ("true < false", Types("<")),
        ];
        for (text, error) in table {
            assert_eq!(evaluated(text), Err(error), "{text}");
        }
    }

    #[test]
    fn what_is_not_read_is_named() {
        let table = [
            ("", "ends at column 1, expected a number, a field or `(`"),
            ("1 +", "ends at column 4, expected a number"),
            ("(1", "ends at column 3, expected `)`"),
            ("1 2", "`2` at column 3, expected an operator or the end"),
            ("1 ? 2", "expected `:`"),
            ("usage.", "expected the name of a field"),
            ("usage[a]", "expected a field's name in quotes"),
            ("usage[\"a\"", "expected `]`"),
            ("response.a", "`response.a` at column 1, expected `usage`"),
            ("size(usage)", "expected one of the functions has, int and double"),
            ("usage.all(x, x > 1)", "methods and macros are not supported"),
            ("'a' in usage", "no strings here"),
            ("1 in [1]", "`in` is not supported"),
            ("[1]", "no lists or maps here"),
            ("has(1)", "a field of `usage` before `)`"),
            ("has(usage)", "a field of `usage` before `)`"),
            ("1.2.3", "expected a number"),
            ("1u", "expected a number of at most 63 bits"),
            ("99999999999999999999", "expected a number of at most 63 bits"),
            ("1 = 1", "`=` at column 3"),
            ("é", "`é` at column 1"),
        ];
        for (text, message) in table {
            let error = Expression::parse(text).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn nothing_is_too_deep_or_too_long() {
        let table = [
            "(".repeat(2_000),
            "-".repeat(2_000),
            "has(".repeat(500),
            "1 ? 1 : ".repeat(400),
            "1 + ".repeat(500),
            "x".repeat(5_000),
        ];
        for text in table {
            assert!(Expression::parse(&text).is_err());
        }
        let deep = format!("{}1{}", "(".repeat(60), ")".repeat(60));
        assert_eq!(evaluated(&deep), Ok(Value::Int(1)));
    }

    #[test]
    fn any_text_is_read_or_refused() {
        const PIECES: [&str; 22] = [
            "usage", ".", "a", "[", "\"", "]", "(", ")", "1", "2.5", "-", "!", "&&", "?", ":", " ",
            "has", "<=", "in", "é", "0x", "%",
        ];
        for seed in 0..20_000 {
            let mut rng = crate::Rng::seeded(seed);
            let text: String =
                (0..rng.below(12)).map(|_| PIECES[rng.below(PIECES.len())]).collect();
            if let Ok(expression) = Expression::parse(&text) {
                let _ = expression.evaluate(&|_| Some(Value::Double(1.0)));
            }
        }
    }
}
