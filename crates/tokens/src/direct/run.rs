//! Which text does a program make of this conversation?

use std::fmt::Write;

use kvroute_wire::request::Chat;

pub(crate) use super::values::{Conversation, Scratch};
use super::values::{Round, Val, View};
use super::{
    ADD_GENERATION_PROMPT, DEPTH, DEPTH0, DOCUMENTS, ENABLE_THINKING, FIRST, For, Global, INDEX,
    INDEX0, LAST, LENGTH, LOOP, MESSAGES, NEXTITEM, Name, Node, Op, PREVITEM, Program,
    REASONING_EFFORT, REVINDEX, REVINDEX0, TOOLS, Unhandled, keywords,
};
use crate::python;
use crate::template::RenderOptions;

/// Most bytes of text that a template makes besides its output.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// Most items of lists that a template makes, and most of other things that it keeps.
const ITEMS_MAX: usize = 1 << 18;
/// Attributes of namespaces at one time: they are looked through one by one.
const FIELDS_MAX: usize = 256;
/// Most macros that call each other.
const MACRO_DEPTH_MAX: usize = 8;

pub(super) type Result<T> = std::result::Result<T, Unhandled>;

/// Ends a run.
pub(super) fn unhandled<T>(why: &'static str) -> Result<T> {
    Err(Unhandled(why))
}

/// What comes after a statement.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    Break,
    Continue,
}

/// A program that is being run.
pub(super) struct Run<'v, 's> {
    pub(super) program: &'v Program,
    pub(super) conversation: Conversation<'v>,
    pub(super) scratch: &'s mut Scratch<'v>,
    out: &'s mut String,
    options: &'v RenderOptions,
    steps_left: u64,
    /// Where the innermost scope begins in the local variables.
    scope: usize,
    /// Where the scopes begin that are seen, besides those of the template's own.
    seen_from: usize,
    /// Where the first scope inside of the template's own begins.
    own_until: Option<usize>,
    macro_depth: usize,
    namespaces: u32,
}

impl Program {
    /// Appends the text of a conversation to `out`. After [`Unhandled`], `out` holds nothing of
    /// worth.
    pub(crate) fn run<'v>(
        &'v self,
        conversation: Conversation<'v>,
        (chat, special_tokens): (&'v Chat<'_>, &'v [(String, String)]),
        options: &'v RenderOptions,
        scratch: &mut Scratch<'v>,
        out: &mut String,
    ) -> Result<()> {
        self.set_context(conversation, (chat, special_tokens), scratch)?;
        let mut run = Run {
            program: self,
            conversation,
            scratch,
            out,
            options,
            steps_left: options.steps_max,
            scope: 0,
            seen_from: 0,
            own_until: None,
            macro_depth: 0,
            namespaces: 0,
        };
        run.ops(&self.body).map(|_| ())
    }

    /// The variables of the request, in the order in which vLLM lets one override another.
    fn set_context<'v>(
        &'v self,
        conversation: Conversation<'v>,
        (chat, special_tokens): (&'v Chat<'_>, &'v [(String, String)]),
        scratch: &mut Scratch<'v>,
    ) -> Result<()> {
        let context = &mut scratch.context;
        context.resize(self.names.len(), Val::Undefined);
        let mut set = |name: Name, value| context[usize::from(name)] = value;
        for (name, token) in special_tokens {
            if let Some(name) = self.name(name) {
                set(name, Val::Text(token));
            }
        }
        set(DOCUMENTS, Val::None);
        set(TOOLS, Val::None);
        let mut sets_thinking = false;
        if let Some(json) = chat.chat_template_kwargs {
            let known = keywords::read(json.get(), |key, value| {
                sets_thinking |= key == "enable_thinking";
                self.name(key).into_iter().for_each(|name| set(name, value));
            });
            known.ok_or(Unhandled("chat_template_kwargs"))?;
        }
        if let Some(effort) = chat.reasoning_effort.as_deref() {
            if effort != "auto" {
                set(REASONING_EFFORT, Val::Text(effort));
            }
            if !sets_thinking {
                set(ENABLE_THINKING, Val::Bool(effort != "none"));
            }
        }
        set(ADD_GENERATION_PROMPT, Val::Bool(chat.add_generation_prompt));
        set(MESSAGES, conversation.all());
        Ok(())
    }
}

impl<'v> Run<'v, '_> {
    /// Charges for one operation.
    pub(super) fn step(&mut self) -> Result<()> {
        self.steps_left = self.steps_left.checked_sub(1).ok_or(Unhandled("many steps"))?;
        Ok(())
    }

    fn ops(&mut self, list: &'v [Op]) -> Result<Flow> {
        for op in list {
            match self.op(op)? {
                Flow::On => {}
                other => return Ok(other),
            }
        }
        Ok(Flow::On)
    }

    fn op(&mut self, op: &'v Op) -> Result<Flow> {
        self.step()?;
        match op {
            Op::Raw(text) => self.print(Val::Text(text))?,
            Op::Emit(node) => self.emit(node, false)?,
            Op::Set(name, node) => {
                let value = self.eval(node)?;
                self.set(*name, value)?;
            }
            Op::SetField(target, name, node) => {
                let value = self.eval(node)?;
                let Val::Namespace(space) = self.eval(target)? else {
                    return unhandled("an assignment to a value");
                };
                self.set_field(space, *name, value)?;
            }
            Op::Capture(name, body) => {
                let from = self.out.len();
                self.ops(body)?;
                let text = self.captured(from)?;
                self.set(*name, text)?;
            }
            Op::If(condition, body, otherwise) => {
                let holds = self.holds(condition)?;
                return self.ops(if holds { body } else { otherwise });
            }
            Op::For(a_loop) => return self.for_loop(a_loop),
            Op::With(set, body) => {
                let outer = self.open_scope();
                for (name, node) in set {
                    let value = self.eval(node)?;
                    self.set(*name, value)?;
                }
                self.ops(body)?;
                self.close_scope(outer);
            }
            Op::Macro(name, at) => {
                if self.own_until.is_some() || self.macro_depth > 0 {
                    return unhandled("a macro inside of something");
                }
                self.set(*name, Val::Macro(*at))?;
            }
            Op::Break => return Ok(Flow::Break),
            Op::Continue => return Ok(Flow::Continue),
            Op::Unknown(why) => return unhandled(why),
        }
        Ok(Flow::On)
    }

    fn for_loop(&mut self, a_loop: &'v For) -> Result<Flow> {
        let mut items = self.eval(&a_loop.iter)?;
        if let Some(filter) = &a_loop.filter {
            items = self.filtered(items, a_loop.target, filter)?;
        }
        let len = match items {
            Val::Undefined => 0,
            items => self.len_of_list(items)?,
        };
        if len == 0 {
            return self.ops(&a_loop.otherwise);
        }
        let outer = self.open_scope();
        let round = u32::try_from(self.scratch.rounds.len()).unwrap_or(u32::MAX);
        self.scratch.rounds.push(Round { items, index: 0, len });
        for index in 0..len {
            self.step()?;
            if let Some(round) = self.scratch.rounds.last_mut() {
                round.index = index;
            }
            self.scratch.locals.truncate(self.scope);
            self.scratch.locals.push((LOOP, Val::Loop(round)));
            let item = self.item(items, index);
            self.set(a_loop.target, item)?;
            if self.ops(&a_loop.body)? == Flow::Break {
                break;
            }
        }
        self.scratch.rounds.pop();
        self.close_scope(outer);
        Ok(Flow::On)
    }

    /// The items for which the condition of a loop holds. The variable `loop` is still that of the
    /// loop around it.
    fn filtered(&mut self, items: Val<'v>, target: Name, filter: &'v Node) -> Result<Val<'v>> {
        let had = self.scratch.stack.len();
        let outer = self.open_scope();
        for index in 0..self.len_of_list(items)? {
            self.step()?;
            self.scratch.locals.truncate(self.scope);
            let item = self.item(items, index);
            self.set(target, item)?;
            if self.holds(filter)? {
                self.scratch.stack.push(item);
            }
        }
        self.close_scope(outer);
        self.list_of(had)
    }

    /// Begins a scope; what [`Run::close_scope`] needs.
    fn open_scope(&mut self) -> (usize, Option<usize>) {
        let outer = (self.scope, self.own_until);
        self.scope = self.scratch.locals.len();
        self.own_until = self.own_until.or(Some(self.scope));
        outer
    }

    fn close_scope(&mut self, outer: (usize, Option<usize>)) {
        self.scratch.locals.truncate(self.scope);
        (self.scope, self.own_until) = outer;
    }

    fn set(&mut self, name: Name, value: Val<'v>) -> Result<()> {
        let locals = &mut self.scratch.locals;
        let is_full = locals.len() >= ITEMS_MAX;
        let known = locals.iter_mut().skip(self.scope).find(|(known, _)| *known == name);
        match known {
            Some(known) => known.1 = value,
            None if is_full => return unhandled("many variables"),
            None => locals.push((name, value)),
        }
        Ok(())
    }

    fn set_field(&mut self, space: u32, name: Name, value: Val<'v>) -> Result<()> {
        let fields = &mut self.scratch.fields;
        let is_full = fields.len() >= FIELDS_MAX;
        match fields.iter_mut().rev().find(|field| (field.0, field.1) == (space, name)) {
            Some(field) => field.2 = value,
            None if is_full => return unhandled("many attributes"),
            None => fields.push((space, name, value)),
        }
        Ok(())
    }

    fn lookup(&self, name: Name) -> Val<'v> {
        let locals = self.scratch.locals.as_slice();
        let own = self.own_until.unwrap_or(locals.len()).min(self.seen_from);
        let (own, seen) = (locals.get(..own), locals.get(self.seen_from..));
        let scopes = [seen, own].into_iter().flatten();
        let mut found = scopes.flat_map(|scope| scope.iter().rev());
        if let Some((_, value)) = found.find(|(known, _)| *known == name) {
            return *value;
        }
        match self.scratch.context.get(usize::from(name)) {
            None | Some(Val::Undefined) => {
                let global = self.program.globals.get(usize::from(name)).copied().flatten();
                global.map_or(Val::Undefined, Val::Function)
            }
            Some(value) => *value,
        }
    }

    /// Prints the value of an expression, without making it where it is a text in parts.
    fn emit(&mut self, node: &'v Node, is_string: bool) -> Result<()> {
        match node {
            Node::Concat { parts, are_strings } => {
                self.step()?;
                parts.iter().try_for_each(|part| self.emit(part, *are_strings))
            }
            Node::Choice(choice) => {
                let [condition, then, otherwise] = choice.as_ref();
                let holds = self.holds(condition)?;
                self.emit(if holds { then } else { otherwise }, is_string)
            }
            Node::Call(name, args) => match self.lookup(*name) {
                Val::Macro(at) => self.call_macro(at, args),
                _ => {
                    let value = self.eval(node)?;
                    self.print_if(value, is_string)
                }
            },
            node => {
                let value = self.eval(node)?;
                self.print_if(value, is_string)
            }
        }
    }

    fn print_if(&mut self, value: Val<'v>, is_string: bool) -> Result<()> {
        match value {
            value if !is_string => self.print(value),
            Val::Text(_) | Val::Made(..) => self.print(value),
            _ => unhandled("a sum of other things than texts"),
        }
    }

    /// Prints a value as Python does.
    fn print(&mut self, value: Val<'v>) -> Result<()> {
        match value {
            Val::Text(text) => self.out.push_str(text),
            Val::Made(from, to) => {
                let text = self.scratch.text.get(from as usize..to as usize);
                self.out.push_str(text.unwrap_or_default());
            }
            Val::Undefined => {}
            Val::None => self.out.push_str("None"),
            Val::Bool(true) => self.out.push_str("True"),
            Val::Bool(false) => self.out.push_str("False"),
            Val::Int(number) => _ = write!(self.out, "{number}"),
            _ => return unhandled("a printed list or object"),
        }
        match self.out.len() <= self.options.output_bytes_max {
            true => Ok(()),
            false => unhandled("a long text"),
        }
    }

    /// Takes back what was printed from a place on, as a value.
    fn captured(&mut self, from: usize) -> Result<Val<'v>> {
        let begin = self.scratch.text.len();
        self.scratch.text.push_str(self.out.get(from..).unwrap_or_default());
        self.out.truncate(from);
        self.made_from(begin)
    }

    /// What was appended to the texts since they had `begin` bytes.
    pub(super) fn made_from(&mut self, begin: usize) -> Result<Val<'v>> {
        let end = self.scratch.text.len();
        if end > TEXT_BYTES_MAX {
            return unhandled("much text on the way");
        }
        Ok(Val::Made(begin as u32, end as u32))
    }

    /// A list of what was put on the stack since it had `had` items.
    pub(super) fn list_of(&mut self, had: usize) -> Result<Val<'v>> {
        let first = self.scratch.items.len();
        self.scratch.items.extend(self.scratch.stack.drain(had..));
        let end = self.scratch.items.len();
        if end > ITEMS_MAX {
            return unhandled("long lists");
        }
        Ok(Val::List(View::all(first as u32, (end - first) as u32)))
    }

    pub(super) fn eval(&mut self, node: &'v Node) -> Result<Val<'v>> {
        self.step()?;
        match node {
            Node::Undefined => Ok(Val::Undefined),
            Node::None => Ok(Val::None),
            Node::Bool(value) => Ok(Val::Bool(*value)),
            Node::Int(number) => Ok(Val::Int(*number)),
            Node::Str(text) => Ok(Val::Text(text)),
            // Another loop could be in its place later.
            Node::Var(name) => match self.lookup(*name) {
                Val::Loop(_) => unhandled("a loop as a value"),
                value => Ok(value),
            },
            Node::Attr(of, name) => {
                let of = match of.as_ref() {
                    Node::Var(name) => self.lookup(*name),
                    of => self.eval(of)?,
                };
                self.attribute(of, *name)
            }
            Node::Item(of) => {
                let [of, index] = self.eval_all(of)?;
                self.indexed(of, index)
            }
            Node::Slice(of) => {
                let [of, start, stop] = self.eval_all(of)?;
                self.sliced(of, start, stop)
            }
            Node::Reversed(of) => {
                let of = self.eval(of)?;
                self.reversed(of)
            }
            Node::Not(of) => self.holds(of).map(|holds| Val::Bool(!holds)),
            Node::Neg(of) => match self.eval(of)? {
                Val::Int(number) => {
                    number.checked_neg().map(Val::Int).ok_or(Unhandled("a large number"))
                }
                _ => unhandled("a calculation"),
            },
            Node::And(pair) | Node::Or(pair) => {
                let [left, right] = pair.as_ref();
                let value = self.eval(left)?;
                let holds = self.is_true(value)?;
                let is_and = matches!(node, Node::And(_));
                if holds == is_and { self.eval(right) } else { Ok(value) }
            }
            Node::Concat { parts, are_strings } => self.concat(parts, *are_strings),
            Node::Binary(op, pair) => {
                let [left, right] = self.eval_all(pair)?;
                self.binary(*op, left, right)
            }
            Node::Choice(choice) => {
                let [condition, then, otherwise] = choice.as_ref();
                let holds = self.holds(condition)?;
                self.eval(if holds { then } else { otherwise })
            }
            Node::List(items) => {
                let had = self.push_all(items)?;
                self.list_of(had)
            }
            Node::Filter(kind, args) => self.filter(*kind, args),
            Node::Test(kind, args) => self.test(*kind, args).map(Val::Bool),
            Node::Method(kind, args) => self.method(*kind, args),
            Node::Call(name, args) => self.call(*name, args),
            Node::Unknown(why) => unhandled(why),
        }
    }

    fn holds(&mut self, condition: &'v Node) -> Result<bool> {
        let value = self.eval(condition)?;
        self.is_true(value)
    }

    fn eval_all<const N: usize>(&mut self, nodes: &'v [Node; N]) -> Result<[Val<'v>; N]> {
        let mut values = [Val::Undefined; N];
        for (value, node) in values.iter_mut().zip(nodes) {
            *value = self.eval(node)?;
        }
        Ok(values)
    }

    /// Puts values on the stack; how many were there before.
    fn push_all(&mut self, nodes: &'v [Node]) -> Result<usize> {
        let had = self.scratch.stack.len();
        for node in nodes {
            let value = self.eval(node)?;
            self.scratch.stack.push(value);
        }
        Ok(had)
    }

    fn concat(&mut self, parts: &'v [Node], are_strings: bool) -> Result<Val<'v>> {
        let had = self.push_all(parts)?;
        let mut begin = self.scratch.text.len();
        let mut from = had;
        // What was made last grows at its end: it stays what it is.
        if let Some(Val::Made(first, end)) = self.scratch.stack.get(had)
            && *end as usize == begin
        {
            (begin, from) = (*first as usize, had + 1);
        }
        for at in from..self.scratch.stack.len() {
            let value = self.scratch.stack[at];
            match value {
                Val::Text(_) | Val::Made(..) => self.push_text(value),
                Val::Undefined if !are_strings => {}
                Val::Int(number) if !are_strings => _ = write!(self.scratch.text, "{number}"),
                _ => return unhandled("a sum of other things than texts"),
            }
        }
        self.scratch.stack.truncate(had);
        self.made_from(begin)
    }

    /// Appends a text to those that were made.
    pub(super) fn push_text(&mut self, value: Val<'v>) {
        match value {
            Val::Text(text) => self.scratch.text.push_str(text),
            Val::Made(from, to) => self.scratch.text.extend_from_within(from as usize..to as usize),
            _ => {}
        }
    }

    /// The text of a value that is one.
    pub(super) fn text(&self, value: Val<'v>) -> Result<&str> {
        match value {
            Val::Text(text) => Ok(text),
            Val::Made(from, to) => {
                let text = self.scratch.text.get(from as usize..to as usize);
                text.ok_or(Unhandled("a text in parts"))
            }
            _ => unhandled("a value that is no text"),
        }
    }

    fn call(&mut self, name: Name, args: &'v [(Option<Name>, Node)]) -> Result<Val<'v>> {
        match self.lookup(name) {
            Val::Macro(at) => {
                let from = self.out.len();
                self.call_macro(at, args)?;
                self.captured(from)
            }
            Val::Function(Global::Namespace) => {
                let space = self.namespaces;
                self.namespaces += 1;
                for (name, node) in args {
                    let value = self.eval(node)?;
                    let name = name.ok_or(Unhandled("a namespace of a dict"))?;
                    self.set_field(space, name, value)?;
                }
                Ok(Val::Namespace(space))
            }
            Val::Function(Global::Now) => {
                let [(None, format)] = args else { return unhandled("the form of a date") };
                let Val::Text(format) = self.eval(format)? else {
                    return unhandled("the form of a date");
                };
                let begin = self.scratch.text.len();
                let seconds = self.options.clock.seconds();
                let written = python::strftime(&mut self.scratch.text, format, seconds);
                written.ok_or(Unhandled("the form of a date"))?;
                self.made_from(begin)
            }
            Val::Function(Global::Raise) => unhandled("an exception"),
            _ => unhandled("a function"),
        }
    }

    /// Prints what a macro makes. It sees its parameters, the variables of the template outside of
    /// all blocks, and those of the request.
    fn call_macro(&mut self, at: u16, args: &'v [(Option<Name>, Node)]) -> Result<()> {
        let called = self.program.macros.get(usize::from(at)).ok_or(Unhandled("a macro"))?;
        if self.macro_depth >= MACRO_DEPTH_MAX || args.len() > called.params.len() {
            return unhandled("a form of macro call");
        }
        let had = self.scratch.stack.len();
        for (_, node) in args {
            let value = self.eval(node)?;
            self.scratch.stack.push(value);
        }
        let outer = (self.open_scope(), self.seen_from);
        self.seen_from = self.scope;
        self.macro_depth += 1;
        let named = |name: &Name| args.iter().position(|(given, _)| given.as_ref() == Some(name));
        let mut used = 0;
        // The engine sets the last parameter first, which its default can see.
        for (place, (name, default)) in called.params.iter().enumerate().rev() {
            let by_place = args.get(place).filter(|(name, _)| name.is_none()).map(|_| place);
            let given = by_place.or_else(|| named(name));
            used += usize::from(given.is_some());
            let given = given.and_then(|place| self.scratch.stack.get(had + place).copied());
            let value = match (given.unwrap_or(Val::Undefined), default) {
                (Val::Undefined, Some(default)) => self.eval(default)?,
                (value, _) => value,
            };
            self.set(*name, value)?;
        }
        // One given twice, or one that the macro does not have.
        if used != args.len() {
            return unhandled("the arguments of a macro");
        }
        self.scratch.stack.truncate(had);
        self.ops(&called.body)?;
        self.macro_depth -= 1;
        self.seen_from = outer.1;
        self.close_scope(outer.0);
        Ok(())
    }

    /// An attribute of the round of a loop.
    pub(super) fn of_round(&self, depth: u32, name: Name) -> Result<Val<'v>> {
        let round = self.scratch.rounds.get(depth as usize).copied();
        let Round { items, index, len } = round.ok_or(Unhandled("a loop that has ended"))?;
        Ok(match name {
            INDEX => Val::Int(i64::from(index) + 1),
            INDEX0 => Val::Int(i64::from(index)),
            FIRST => Val::Bool(index == 0),
            LAST => Val::Bool(index + 1 == len),
            LENGTH => Val::Int(i64::from(len)),
            REVINDEX => Val::Int(i64::from(len - index)),
            REVINDEX0 => Val::Int(i64::from(len - index - 1)),
            PREVITEM if index == 0 => Val::Undefined,
            PREVITEM => self.item(items, index - 1),
            NEXTITEM if index + 1 == len => Val::Undefined,
            NEXTITEM => self.item(items, index + 1),
            DEPTH => Val::Int(1),
            DEPTH0 => Val::Int(0),
            _ => Val::Undefined,
        })
    }

    pub(super) fn field(&self, space: u32, name: Name) -> Val<'v> {
        let mut fields = self.scratch.fields.iter().rev();
        fields.find(|field| (field.0, field.1) == (space, name)).map_or(Val::Undefined, |f| f.2)
    }
}
