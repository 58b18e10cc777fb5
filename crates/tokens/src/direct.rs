//! Which steps does this template take, in a form that runs without asking for memory?
//!
//! The template engine makes values on the heap for every message, loop and filter. A chat of roles
//! and texts, which nearly all are, needs none of that: [`Program`] is the template's syntax tree,
//! made once, and [`run`] goes through it with values that point into the request, the program and
//! memory that is used again.
//!
//! **What is not known here is not guessed**: a construct, filter or type of value that this form
//! does not handle, an error, a limit that is hit, all end the run with [`Unhandled`], and the
//! template engine renders the conversation from the start. So the engine stays the reference, and
//! gives all errors. When a template is loaded, both render a few conversations; a form that
//! differs in a byte is not used. Where the engine does not do as Python's Jinja does, this form
//! does: `get` of a key that is missing gives its default even if that is undefined, and a macro
//! may set a variable from the template's own of the same name.

mod keywords;
mod ops;
pub(crate) mod run;
mod values;

use std::borrow::Cow;

use kvroute_wire::request::{Chat, Messages, PlainTurn};
use minijinja::Value;
use minijinja::machinery::ast::{self, BinOpKind, CallArg, CallType, Expr, Stmt, UnaryOpKind};
use minijinja::value::ValueKind;

/// Why a run ended before the text was complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unhandled(pub(crate) &'static str);

/// The place of a name in [`Program::names`].
type Name = u16;

/// Names that have a meaning here, in the order of the constants below.
const KNOWN_NAMES: [&str; 22] = [
    "role",
    "content",
    "type",
    "text",
    "tools",
    "loop",
    "messages",
    "documents",
    "add_generation_prompt",
    "enable_thinking",
    "reasoning_effort",
    "index",
    "index0",
    "first",
    "last",
    "length",
    "revindex",
    "revindex0",
    "previtem",
    "nextitem",
    "depth",
    "depth0",
];
const ROLE: Name = 0;
const CONTENT: Name = 1;
const TYPE: Name = 2;
const TEXT: Name = 3;
const TOOLS: Name = 4;
const LOOP: Name = 5;
const MESSAGES: Name = 6;
const DOCUMENTS: Name = 7;
const ADD_GENERATION_PROMPT: Name = 8;
const ENABLE_THINKING: Name = 9;
const REASONING_EFFORT: Name = 10;
const INDEX: Name = 11;
const INDEX0: Name = 12;
const FIRST: Name = 13;
const LAST: Name = 14;
const LENGTH: Name = 15;
const REVINDEX: Name = 16;
const REVINDEX0: Name = 17;
const PREVITEM: Name = 18;
const NEXTITEM: Name = 19;
const DEPTH: Name = 20;
const DEPTH0: Name = 21;

/// A template that can be run.
pub(crate) struct Program {
    body: Vec<Op>,
    names: Vec<Box<str>>,
    /// What a name means that no variable has, by name.
    globals: Vec<Option<Global>>,
    macros: Vec<Macro>,
}

/// A function of the environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    Raise,
    Now,
    Namespace,
    Other,
}

struct Macro {
    /// Parameters and their defaults.
    params: Vec<(Name, Option<Node>)>,
    body: Vec<Op>,
}

/// A statement.
enum Op {
    Raw(Box<str>),
    Emit(Node),
    Set(Name, Node),
    /// `{% set target.field = value %}`.
    SetField(Node, Name, Node),
    /// `{% set name %}...{% endset %}`.
    Capture(Name, Vec<Op>),
    If(Node, Vec<Op>, Vec<Op>),
    For(Box<For>),
    With(Vec<(Name, Node)>, Vec<Op>),
    Macro(Name, u16),
    Break,
    Continue,
    Unknown(&'static str),
}

struct For {
    target: Name,
    iter: Node,
    filter: Option<Node>,
    body: Vec<Op>,
    otherwise: Vec<Op>,
}

/// An expression.
enum Node {
    None,
    Bool(bool),
    Int(i64),
    Str(Box<str>),
    Var(Name),
    Attr(Box<Node>, Name),
    Item(Box<[Node; 2]>),
    /// Value, start and stop.
    Slice(Box<[Node; 3]>),
    /// `value[::-1]`.
    Reversed(Box<Node>),
    Not(Box<Node>),
    Neg(Box<Node>),
    And(Box<[Node; 2]>),
    Or(Box<[Node; 2]>),
    /// Printed one after the other: `~`, or a sum that holds a string, where all must be strings.
    Concat {
        parts: Vec<Node>,
        are_strings: bool,
    },
    Binary(BinOpKind, Box<[Node; 2]>),
    /// Condition, value, other value.
    Choice(Box<[Node; 3]>),
    Undefined,
    List(Vec<Node>),
    /// The first is the value.
    Filter(Filter, Vec<Node>),
    Test(Test, Vec<Node>),
    Method(Method, Vec<Node>),
    Call(Name, Vec<(Option<Name>, Node)>),
    Unknown(&'static str),
}

/// An enum of names, and how a name in a template is read.
macro_rules! named {
    ($kind:ident { $($variant:ident: $($name:literal)|+),+ $(,)? }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        enum $kind { $($variant),+ }

        impl $kind {
            fn named(name: &str) -> Option<$kind> {
                match name {
                    $($($name)|+ => Some($kind::$variant),)+
                    _ => None,
                }
            }
        }
    };
}

named!(Filter {
    Trim: "trim",
    Length: "length" | "count",
    Upper: "upper",
    Lower: "lower",
    Default: "default" | "d",
    Join: "join",
    Replace: "replace",
    String: "string",
    First: "first",
    Last: "last",
    List: "list",
    Reverse: "reverse",
    ToJson: "tojson",
    SelectAttr: "selectattr",
    RejectAttr: "rejectattr",
});

named!(Test {
    Defined: "defined",
    Undefined: "undefined",
    None: "none",
    String: "string",
    Number: "number",
    Integer: "integer" | "int",
    Boolean: "boolean",
    Mapping: "mapping",
    Iterable: "iterable",
    Sequence: "sequence",
    True: "true",
    False: "false",
    Eq: "eq" | "equalto" | "==",
    Ne: "ne" | "!=",
    In: "in",
    Odd: "odd",
    Even: "even",
    DivisibleBy: "divisibleby",
});

named!(Method {
    StartsWith: "startswith",
    EndsWith: "endswith",
    Strip: "strip",
    LStrip: "lstrip",
    RStrip: "rstrip",
    Split: "split",
    Replace: "replace",
    Upper: "upper",
    Lower: "lower",
    RemovePrefix: "removeprefix",
    RemoveSuffix: "removesuffix",
    Get: "get",
});

impl Program {
    /// The form of a parsed template; `is_global` tells which names the environment knows. `None`
    /// for one with more names than any real template.
    pub(crate) fn of(template: &Stmt<'_>, is_global: impl Fn(&str) -> bool) -> Option<Program> {
        let names = KNOWN_NAMES.map(Box::from).to_vec();
        let mut maker = Maker { names, macros: Vec::new() };
        let body = match template {
            Stmt::Template(template) => maker.ops(&template.children),
            other => vec![maker.op(other)],
        };
        let Maker { names, macros } = maker;
        let global = |name: &str| match name {
            "raise_exception" => Some(Global::Raise),
            "strftime_now" => Some(Global::Now),
            "namespace" => Some(Global::Namespace),
            name => is_global(name).then_some(Global::Other),
        };
        let globals = names.iter().map(|name| global(name)).collect();
        (names.len() <= usize::from(Name::MAX)).then_some(Program { body, names, globals, macros })
    }

    fn name(&self, text: &str) -> Option<Name> {
        let at = self.names.iter().position(|name| **name == *text)?;
        Name::try_from(at).ok()
    }
}

/// A program that is being made.
struct Maker {
    names: Vec<Box<str>>,
    macros: Vec<Macro>,
}

impl Maker {
    fn name(&mut self, text: &str) -> Name {
        let known = self.names.iter().position(|name| **name == *text);
        let at = known.unwrap_or_else(|| {
            self.names.push(Box::from(text));
            self.names.len() - 1
        });
        // A program with more names than that is not used.
        Name::try_from(at).unwrap_or(Name::MAX)
    }

    fn ops(&mut self, list: &[Stmt<'_>]) -> Vec<Op> {
        list.iter().map(|statement| self.op(statement)).collect()
    }

    fn op(&mut self, statement: &Stmt<'_>) -> Op {
        match statement {
            Stmt::EmitExpr(emit) => Op::Emit(self.node(&emit.expr)),
            Stmt::EmitRaw(raw) => Op::Raw(Box::from(raw.raw)),
            Stmt::ForLoop(a_loop) => self.for_loop(a_loop),
            Stmt::IfCond(cond) => {
                Op::If(self.node(&cond.expr), self.ops(&cond.true_body), self.ops(&cond.false_body))
            }
            Stmt::WithBlock(with) => {
                // The engine leaves the scope on its stack when a loop is left from inside of it.
                if leaves_loop(&with.body) {
                    return Op::Unknown("a loop that is left from inside of a block");
                }
                let mut set = Vec::new();
                for (target, expr) in &with.assignments {
                    let Expr::Var(target) = target else { return Op::Unknown("unpacking") };
                    set.push((self.name(target.id), self.node(expr)));
                }
                Op::With(set, self.ops(&with.body))
            }
            Stmt::Set(set) => match &set.target {
                Expr::Var(target) => Op::Set(self.name(target.id), self.node(&set.expr)),
                Expr::GetAttr(attr) => {
                    Op::SetField(self.node(&attr.expr), self.name(attr.name), self.node(&set.expr))
                }
                _ => Op::Unknown("unpacking"),
            },
            Stmt::SetBlock(set) => match (&set.target, &set.filter) {
                (Expr::Var(target), None) if !leaves_loop(&set.body) => {
                    Op::Capture(self.name(target.id), self.ops(&set.body))
                }
                _ => Op::Unknown("a form of set block"),
            },
            Stmt::Macro(made) => self.macro_of(made),
            Stmt::Break(_) => Op::Break,
            Stmt::Continue(_) => Op::Continue,
            _ => Op::Unknown("a statement"),
        }
    }

    fn for_loop(&mut self, a_loop: &ast::ForLoop<'_>) -> Op {
        let Expr::Var(target) = &a_loop.target else { return Op::Unknown("unpacking") };
        // The engine takes a loop that ends in its first round for one without a round.
        if a_loop.recursive || (!a_loop.else_body.is_empty() && leaves_loop(&a_loop.body)) {
            return Op::Unknown("a form of loop");
        }
        Op::For(Box::new(For {
            target: self.name(target.id),
            iter: self.node(&a_loop.iter),
            filter: a_loop.filter_expr.as_ref().map(|filter| self.node(filter)),
            body: self.ops(&a_loop.body),
            otherwise: self.ops(&a_loop.else_body),
        }))
    }

    fn macro_of(&mut self, made: &ast::Macro<'_>) -> Op {
        let mut params = Vec::new();
        let without = made.args.len().saturating_sub(made.defaults.len());
        for (at, param) in made.args.iter().enumerate() {
            let Expr::Var(param) = param else { return Op::Unknown("unpacking") };
            let default = at.checked_sub(without).and_then(|at| made.defaults.get(at));
            let default = default.map(|default| self.node(default));
            params.push((self.name(param.id), default));
        }
        let body = self.ops(&made.body);
        let at = self.macros.len();
        self.macros.push(Macro { params, body });
        match u16::try_from(at) {
            Ok(at) => Op::Macro(self.name(made.name), at),
            Err(_) => Op::Unknown("many macros"),
        }
    }

    fn nodes<'a>(&mut self, list: impl IntoIterator<Item = &'a Expr<'a>>) -> Vec<Node> {
        list.into_iter().map(|expr| self.node(expr)).collect()
    }

    fn pair(&mut self, left: &Expr<'_>, right: &Expr<'_>) -> Box<[Node; 2]> {
        Box::new([self.node(left), self.node(right)])
    }

    fn node(&mut self, expr: &Expr<'_>) -> Node {
        match expr {
            Expr::Var(var) => Node::Var(self.name(var.id)),
            Expr::Const(value) => constant(&value.value),
            Expr::Slice(slice) => self.slice(slice),
            Expr::UnaryOp(unary) => match unary.op {
                UnaryOpKind::Not => Node::Not(Box::new(self.node(&unary.expr))),
                UnaryOpKind::Neg => Node::Neg(Box::new(self.node(&unary.expr))),
            },
            Expr::BinOp(binary) => self.binary(binary),
            Expr::IfExpr(choice) => Node::Choice(Box::new([
                self.node(&choice.test_expr),
                self.node(&choice.true_expr),
                choice.false_expr.as_ref().map_or(Node::Undefined, |expr| self.node(expr)),
            ])),
            Expr::Filter(filter) => self.filter(filter),
            Expr::Test(test) => match (Test::named(test.name), positional(&test.args)) {
                (Some(kind), Some(args)) => {
                    Node::Test(kind, self.nodes(std::iter::once(&test.expr).chain(args)))
                }
                _ => Node::Unknown("a test"),
            },
            Expr::GetAttr(attr) => {
                Node::Attr(Box::new(self.node(&attr.expr)), self.name(attr.name))
            }
            Expr::GetItem(item) => match item.subscript_expr.as_const() {
                Some(key) if key.as_str().is_some() => {
                    let name = self.name(key.as_str().unwrap_or_default());
                    Node::Attr(Box::new(self.node(&item.expr)), name)
                }
                _ => Node::Item(self.pair(&item.expr, &item.subscript_expr)),
            },
            Expr::Call(call) => self.call(call),
            Expr::List(list) => Node::List(self.nodes(&list.items)),
            // Like a list only as long as nothing is done with it.
            Expr::Tuple(_) => Node::Unknown("a tuple"),
            Expr::Compare(_) => Node::Unknown("a chain of comparisons"),
            Expr::Map(_) => Node::Unknown("a dict"),
        }
    }

    fn slice(&mut self, slice: &ast::Slice<'_>) -> Node {
        let step = slice.step.as_ref().map(|step| step.as_const().and_then(|step| step.as_i64()));
        let mut end = |end: &Option<Expr<'_>>| end.as_ref().map_or(Node::None, |e| self.node(e));
        match (step, &slice.start, &slice.stop) {
            (None | Some(Some(1)), start, stop) => {
                let ends = [end(start), end(stop)];
                let [start, stop] = ends;
                Node::Slice(Box::new([self.node(&slice.expr), start, stop]))
            }
            (Some(Some(-1)), None, None) => Node::Reversed(Box::new(self.node(&slice.expr))),
            _ => Node::Unknown("a step in a slice"),
        }
    }

    fn binary(&mut self, binary: &ast::BinOp<'_>) -> Node {
        match binary.op {
            BinOpKind::ScAnd => Node::And(self.pair(&binary.left, &binary.right)),
            BinOpKind::ScOr => Node::Or(self.pair(&binary.left, &binary.right)),
            BinOpKind::Div | BinOpKind::Pow => Node::Unknown("a calculation"),
            op @ (BinOpKind::Add | BinOpKind::Concat) => {
                let mut operands = Vec::new();
                operands_of(op, &binary.left, &binary.right, &mut operands);
                let is_string = |expr: &&Expr<'_>| match expr {
                    Expr::Const(value) => value.value.as_str().is_some(),
                    _ => false,
                };
                let are_strings = matches!(op, BinOpKind::Add);
                match are_strings && !operands.iter().any(is_string) {
                    true => Node::Binary(op, self.pair(&binary.left, &binary.right)),
                    false => Node::Concat { parts: self.nodes(operands), are_strings },
                }
            }
            op => {
                let right = match (op, &binary.right) {
                    (BinOpKind::In, Expr::Tuple(tuple)) => Node::List(self.nodes(&tuple.items)),
                    (_, right) => self.node(right),
                };
                Node::Binary(op, Box::new([self.node(&binary.left), right]))
            }
        }
    }

    fn filter(&mut self, filter: &ast::Filter<'_>) -> Node {
        let known = Filter::named(filter.name).zip(positional(&filter.args));
        let (Some((kind, args)), Some(value)) = (known, &filter.expr) else {
            return Node::Unknown("a filter");
        };
        if !matches!(kind, Filter::SelectAttr | Filter::RejectAttr) {
            return Node::Filter(kind, self.nodes(std::iter::once(value).chain(args)));
        }
        // Nothing but `selectattr('name', 'equalto', value)`.
        let [Expr::Const(attr), Expr::Const(test), wanted] = args.as_slice() else {
            return Node::Unknown("a filter of messages");
        };
        let is_path = |attr: &str| attr.contains('.');
        match (attr.value.as_str(), test.value.as_str().and_then(Test::named)) {
            (Some(attr), Some(Test::Eq)) if !is_path(attr) => {
                // The name takes the place of an attribute of anything.
                let attr = Node::Attr(Box::new(Node::Undefined), self.name(attr));
                Node::Filter(kind, vec![self.node(value), attr, self.node(wanted)])
            }
            _ => Node::Unknown("a filter of messages"),
        }
    }

    fn call(&mut self, call: &ast::Call<'_>) -> Node {
        match call.identify_call() {
            CallType::Function("super" | "loop" | "caller") => Node::Unknown("a function"),
            CallType::Function(name) => {
                let mut args = Vec::new();
                for arg in &call.args {
                    args.push(match arg {
                        CallArg::Pos(expr) => (None, self.node(expr)),
                        CallArg::Kwarg(name, expr) => (Some(self.name(name)), self.node(expr)),
                        _ => return Node::Unknown("unpacked arguments"),
                    });
                }
                Node::Call(self.name(name), args)
            }
            CallType::Method(expr, name) => match (Method::named(name), positional(&call.args)) {
                (Some(kind), Some(args)) => {
                    Node::Method(kind, self.nodes(std::iter::once(expr).chain(args)))
                }
                _ => Node::Unknown("a method"),
            },
            _ => Node::Unknown("a call"),
        }
    }
}

/// Whether a `break` or `continue` among the statements leaves a loop around them.
fn leaves_loop(list: &[Stmt<'_>]) -> bool {
    list.iter().any(|statement| match statement {
        Stmt::Break(_) | Stmt::Continue(_) => true,
        Stmt::IfCond(cond) => leaves_loop(&cond.true_body) || leaves_loop(&cond.false_body),
        Stmt::WithBlock(with) => leaves_loop(&with.body),
        Stmt::SetBlock(set) => leaves_loop(&set.body),
        Stmt::FilterBlock(block) => leaves_loop(&block.body),
        Stmt::ForLoop(a_loop) => leaves_loop(&a_loop.else_body),
        _ => false,
    })
}

/// The operands of a sum that is taken from left to right.
fn operands_of<'a>(
    op: BinOpKind,
    left: &'a Expr<'a>,
    right: &'a Expr<'a>,
    into: &mut Vec<&'a Expr<'a>>,
) {
    match left {
        Expr::BinOp(inner) if is_same(inner.op, op) => {
            operands_of(op, &inner.left, &inner.right, into);
        }
        left => into.push(left),
    }
    into.push(right);
}

fn is_same(a: BinOpKind, b: BinOpKind) -> bool {
    std::mem::discriminant(&a) == std::mem::discriminant(&b)
}

/// The arguments; `None` if any is named or unpacked.
fn positional<'a>(args: &'a [CallArg<'a>]) -> Option<Vec<&'a Expr<'a>>> {
    let expr = |arg: &'a CallArg<'a>| match arg {
        CallArg::Pos(expr) => Some(expr),
        _ => None,
    };
    args.iter().map(expr).collect()
}

fn constant(value: &Value) -> Node {
    match value.kind() {
        ValueKind::None => Node::None,
        ValueKind::Bool => Node::Bool(value.is_true()),
        ValueKind::Number if value.is_integer() => {
            value.as_i64().map_or(Node::Unknown("a large number"), Node::Int)
        }
        ValueKind::String => Node::Str(Box::from(value.as_str().unwrap_or_default())),
        _ => Node::Unknown("a constant"),
    }
}

/// Conversations that are rendered both ways when a template is loaded.
pub(crate) fn probes() -> impl Iterator<Item = Chat<'static>> {
    const CONVERSATIONS: [&[(&str, &str)]; 6] = [
        &[("user", "What is it?")],
        &[("system", " Be brief. "), ("user", "One.\n")],
        &[("user", "One?"), ("assistant", " Yes.\n"), ("user", "Two?")],
        &[
            ("system", "You think."),
            ("user", "<b>é</b>"),
            ("assistant", "<think>\nWell, what?\n</think>\n\nYes."),
            ("user", ""),
            ("assistant", "No."),
        ],
        &[("user", "Look."), ("assistant", ""), ("tool", "7"), ("tool", "{}"), ("user", "So?")],
        &[("system", "a"), ("system", "b"), ("developer", "c"), ("user", "d"), ("other", "e")],
    ];
    let turn = |(role, content): &(&'static str, &'static str)| PlainTurn {
        role: Cow::Borrowed(role),
        content: Cow::Borrowed(content),
    };
    CONVERSATIONS.into_iter().flat_map(move |turns| {
        [(true, None), (false, None), (true, Some("none"))].map(move |(opens, effort)| Chat {
            messages: Messages::Plain { turns: turns.iter().map(turn).collect(), json: b"[]" },
            tools: None,
            documents: None,
            chat_template: None,
            chat_template_kwargs: None,
            add_generation_prompt: opens,
            continue_final_message: false,
            add_special_tokens: false,
            reasoning_effort: effort.map(Cow::Borrowed),
        })
    })
}
