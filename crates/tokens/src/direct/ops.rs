//! What do operators, filters, tests and methods give, for the values that a run has?
//!
//! As the template engine does it, with the changes of [`crate::methods`]; whatever is not needed
//! by chats is left to it.

use std::cmp::Ordering;
use std::fmt::Write;

use minijinja::machinery::ast::BinOpKind;

use super::run::{Result, Run, unhandled};
use super::values::{Val, View};
use super::{CONTENT, Filter, Method, Name, Node, ROLE, TOOLS, Test, Unhandled};
use crate::methods::strip;
use crate::python;

impl<'v> Run<'v, '_> {
    pub(super) fn is_true(&self, value: Val<'v>) -> Result<bool> {
        Ok(match value {
            Val::Undefined | Val::None => false,
            Val::Bool(value) => value,
            Val::Int(number) => number != 0,
            Val::Text(text) => !text.is_empty(),
            Val::Made(from, to) => from < to,
            Val::Messages(view) | Val::List(view) => view.len > 0,
            Val::Message(_) | Val::Parts(_) | Val::Part(_) => true,
            Val::Namespace(_) | Val::Loop(_) | Val::Macro(_) | Val::Function(_) => {
                return unhandled("the truth of an object");
            }
        })
    }

    pub(super) fn len_of_list(&self, value: Val<'v>) -> Result<u32> {
        match value {
            Val::Messages(view) | Val::List(view) => Ok(view.len),
            Val::Parts(_) => Ok(1),
            _ => unhandled("a value that is no list"),
        }
    }

    /// An item of a list; [`Val::Undefined`] behind its end.
    pub(super) fn item(&self, list: Val<'v>, index: u32) -> Val<'v> {
        match list {
            Val::Messages(view) => view.at(index).map_or(Val::Undefined, Val::Message),
            Val::List(view) => {
                let item = view.at(index).and_then(|at| self.scratch.items.get(at as usize));
                item.copied().unwrap_or(Val::Undefined)
            }
            Val::Parts(message) if index == 0 => Val::Part(message),
            _ => Val::Undefined,
        }
    }

    pub(super) fn attribute(&self, of: Val<'v>, name: Name) -> Result<Val<'v>> {
        match of {
            Val::Message(message) => Ok(self.conversation.field(message, name)),
            Val::Part(message) => Ok(self.conversation.part_field(message, name)),
            Val::Namespace(space) => Ok(self.field(space, name)),
            Val::Loop(depth) => self.of_round(depth, name),
            Val::Undefined => unhandled("an attribute of nothing"),
            Val::Macro(_) | Val::Function(_) => unhandled("an attribute of a function"),
            _ => Ok(Val::Undefined),
        }
    }

    pub(super) fn indexed(&self, of: Val<'v>, index: Val<'v>) -> Result<Val<'v>> {
        let Val::Int(index) = index else { return unhandled("an index that is no number") };
        let place = |len: u32| {
            let from_end = i64::from(len).checked_add(index).filter(|place| *place >= 0);
            u32::try_from(if index < 0 { from_end? } else { index }).ok()
        };
        match of {
            Val::Messages(_) | Val::List(_) | Val::Parts(_) => {
                let place = place(self.len_of_list(of)?);
                Ok(place.map_or(Val::Undefined, |place| self.item(of, place)))
            }
            Val::Text(_) | Val::Made(..) => {
                let text = self.text(of)?;
                let mut chars = text.char_indices();
                let found = match usize::try_from(index) {
                    Ok(index) => chars.nth(index),
                    Err(_) => usize::try_from(-1 - index).ok().and_then(|at| chars.nth_back(at)),
                };
                let found = found.map(|(at, c)| part(of, at, at + c.len_utf8()));
                Ok(found.unwrap_or(Val::Undefined))
            }
            _ => unhandled("an item of something"),
        }
    }

    /// `of[start:stop]`.
    pub(super) fn sliced(&self, of: Val<'v>, start: Val<'v>, stop: Val<'v>) -> Result<Val<'v>> {
        let end = |value| match value {
            Val::None => Ok(None),
            Val::Int(end) => Ok(Some(end)),
            _ => unhandled("the end of a slice"),
        };
        let (start, stop) = (end(start)?, end(stop)?);
        // Begin and length, both within `len`.
        let bounds = |len: usize| {
            let len_i = i64::try_from(len).unwrap_or(i64::MAX);
            let at = |end: i64| if end < 0 { len_i.saturating_add(end).max(0) } else { end };
            let from = at(start.unwrap_or(0)).min(len_i);
            let to = stop.map_or(len_i, at).clamp(from, len_i);
            (usize::try_from(from).unwrap_or(len), usize::try_from(to - from).unwrap_or(0))
        };
        match of {
            Val::Messages(view) | Val::List(view) => {
                let (from, len) = bounds(view.len as usize);
                let view = view.part(from as u32, len as u32);
                let is_messages = matches!(of, Val::Messages(_));
                Ok(if is_messages { Val::Messages(view) } else { Val::List(view) })
            }
            Val::Undefined | Val::None => Ok(Val::List(View::all(0, 0))),
            Val::Text(_) | Val::Made(..) => {
                let text = self.text(of)?;
                let (from, len) = bounds(text.chars().count());
                let mut places = text.char_indices().map(|(at, _)| at);
                let from = places.by_ref().nth(from).unwrap_or(text.len());
                let to = match len {
                    0 => from,
                    len => places.nth(len - 1).unwrap_or(text.len()),
                };
                Ok(part(of, from, to))
            }
            _ => unhandled("a slice of something"),
        }
    }

    pub(super) fn reversed(&self, of: Val<'v>) -> Result<Val<'v>> {
        match of {
            Val::Messages(view) => Ok(Val::Messages(view.reversed())),
            Val::List(view) => Ok(Val::List(view.reversed())),
            _ => unhandled("something reversed"),
        }
    }

    pub(super) fn binary(
        &mut self,
        op: BinOpKind,
        left: Val<'v>,
        right: Val<'v>,
    ) -> Result<Val<'v>> {
        let ordered = |ordering: Ordering| match op {
            BinOpKind::Lt => ordering.is_lt(),
            BinOpKind::Lte => ordering.is_le(),
            BinOpKind::Gt => ordering.is_gt(),
            _ => ordering.is_ge(),
        };
        match op {
            BinOpKind::Eq => return self.is_equal(left, right).map(Val::Bool),
            BinOpKind::Ne => return self.is_equal(left, right).map(|equal| Val::Bool(!equal)),
            BinOpKind::In => return self.is_in(left, right).map(Val::Bool),
            _ => {}
        }
        let is_text = |value| matches!(value, Val::Text(_) | Val::Made(..));
        let is_list = |value| matches!(value, Val::Messages(_) | Val::List(_));
        if is_list(left) && is_list(right) && matches!(op, BinOpKind::Add) {
            return self.list_sum(left, right);
        }
        let (a, b) = match (left, right) {
            (Val::Int(a), Val::Int(b)) => (a, b),
            (left, right) if is_text(left) && is_text(right) => match op {
                BinOpKind::Add => {
                    let begin = self.scratch.text.len();
                    self.push_text(left);
                    self.push_text(right);
                    return self.made_from(begin);
                }
                BinOpKind::Lt | BinOpKind::Lte | BinOpKind::Gt | BinOpKind::Gte => {
                    let ordering = self.text(left)?.cmp(self.text(right)?);
                    return Ok(Val::Bool(ordered(ordering)));
                }
                _ => return unhandled("a calculation with texts"),
            },
            _ => return unhandled("a calculation with other things than numbers"),
        };
        let number = match op {
            BinOpKind::Lt | BinOpKind::Lte | BinOpKind::Gt | BinOpKind::Gte => {
                return Ok(Val::Bool(ordered(a.cmp(&b))));
            }
            BinOpKind::Add => a.checked_add(b),
            BinOpKind::Sub => a.checked_sub(b),
            BinOpKind::Mul => a.checked_mul(b),
            // By a positive number, rounding is the same in all languages.
            BinOpKind::FloorDiv if b > 0 => Some(a.div_euclid(b)),
            BinOpKind::Rem if b > 0 => Some(a.rem_euclid(b)),
            _ => None,
        };
        number.map(Val::Int).ok_or(Unhandled("a calculation"))
    }

    fn list_sum(&mut self, left: Val<'v>, right: Val<'v>) -> Result<Val<'v>> {
        let had = self.scratch.stack.len();
        for list in [left, right] {
            for index in 0..self.len_of_list(list)? {
                self.step()?;
                let item = self.item(list, index);
                self.scratch.stack.push(item);
            }
        }
        match self.list_of(had)? {
            Val::List(view) => Ok(Val::List(View { is_sequence: false, ..view })),
            other => Ok(other),
        }
    }

    fn is_equal(&self, left: Val<'v>, right: Val<'v>) -> Result<bool> {
        Ok(match (left, right) {
            (Val::Undefined, Val::Undefined) | (Val::None, Val::None) => true,
            (Val::Bool(a), Val::Bool(b)) => a == b,
            (Val::Int(a), Val::Int(b)) => a == b,
            (Val::Bool(a), Val::Int(b)) | (Val::Int(b), Val::Bool(a)) => i64::from(a) == b,
            (Val::Text(_) | Val::Made(..), Val::Text(_) | Val::Made(..)) => {
                self.text(left)? == self.text(right)?
            }
            (left, right) if is_scalar(left) || is_scalar(right) => false,
            _ => return unhandled("a comparison of lists or objects"),
        })
    }

    /// `value in container`.
    fn is_in(&self, value: Val<'v>, container: Val<'v>) -> Result<bool> {
        match container {
            Val::Undefined => Ok(false),
            Val::Text(_) | Val::Made(..) => Ok(self.text(container)?.contains(self.text(value)?)),
            Val::List(view) => {
                for index in 0..view.len {
                    if self.is_equal(self.item(container, index), value)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Val::Message(message) => {
                let key = self.text(value)?;
                let name =
                    self.program.name(key).filter(|name| [ROLE, CONTENT, TOOLS].contains(name));
                let field = name.map(|name| self.conversation.field(message, name));
                Ok(!matches!(field, None | Some(Val::Undefined)))
            }
            Val::Part(_) => Ok(matches!(self.text(value)?, "type" | "text")),
            _ => unhandled("a search in something"),
        }
    }

    fn eval_args<const N: usize>(&mut self, nodes: &'v [Node]) -> Result<[Val<'v>; N]> {
        if nodes.len() > N {
            return unhandled("many arguments");
        }
        let mut values = [Val::Undefined; N];
        for (value, node) in values.iter_mut().zip(nodes) {
            *value = self.eval(node)?;
        }
        Ok(values)
    }

    pub(super) fn filter(&mut self, kind: Filter, nodes: &'v [Node]) -> Result<Val<'v>> {
        if matches!(kind, Filter::SelectAttr | Filter::RejectAttr) {
            return self.select(kind == Filter::SelectAttr, nodes);
        }
        let [value, first, second] = self.eval_args(nodes)?;
        let given = nodes.len() - 1;
        match (kind, given) {
            (Filter::Trim, 0) => self.stripped(value, None, (true, true)),
            (Filter::Trim, 1) => self.stripped(value, Some(first), (true, true)),
            (Filter::Length, 0) => self.length(value),
            (Filter::Upper | Filter::Lower, 0) => self.in_case(value, kind == Filter::Upper),
            (Filter::Default, 0..=2) => {
                let is_lax = given == 2 && self.is_true(second)?;
                let is_missing =
                    matches!(value, Val::Undefined) || (is_lax && !self.is_true(value)?);
                let other = if given == 0 { Val::Text("") } else { first };
                Ok(if is_missing { other } else { value })
            }
            (Filter::Join, 0 | 1) => {
                self.joined(value, if given == 0 { Val::Text("") } else { first })
            }
            (Filter::Replace, 2) => self.replaced(value, first, second),
            (Filter::String, 0) => match value {
                Val::Int(number) => self.written(number),
                value => self.text(value).map(|_| value),
            },
            (Filter::First | Filter::Last, 0) => {
                let last = self.len_of_list(value)?.saturating_sub(1);
                Ok(self.item(value, if kind == Filter::First { 0 } else { last }))
            }
            (Filter::List, 0) => match value {
                Val::Messages(view) => Ok(Val::Messages(View { is_sequence: true, ..view })),
                Val::List(view) => Ok(Val::List(View { is_sequence: true, ..view })),
                _ => unhandled("a list of something"),
            },
            (Filter::Reverse, 0) => self.reversed(value),
            (Filter::ToJson, 0) => self.json(value),
            _ => unhandled("a form of filter"),
        }
    }

    /// The messages with an attribute of some value, or without.
    fn select(&mut self, wants_equal: bool, nodes: &'v [Node]) -> Result<Val<'v>> {
        let [list, Node::Attr(_, name), wanted] = nodes else { return unhandled("a filter") };
        let (list, wanted) = (self.eval(list)?, self.eval(wanted)?);
        let had = self.scratch.stack.len();
        for index in 0..self.len_of_list(list)? {
            let item = self.item(list, index);
            let value = self.attribute(item, *name)?;
            if self.is_equal(value, wanted)? == wants_equal {
                self.scratch.stack.push(item);
            }
        }
        self.list_of(had)
    }

    fn length(&self, value: Val<'v>) -> Result<Val<'v>> {
        let len = match value {
            Val::Undefined => 0,
            Val::Text(_) | Val::Made(..) => self.text(value)?.chars().count() as i64,
            value => i64::from(self.len_of_list(value)?),
        };
        Ok(Val::Int(len))
    }

    fn stripped(
        &self,
        value: Val<'v>,
        chars: Option<Val<'v>>,
        (at_start, at_end): (bool, bool),
    ) -> Result<Val<'v>> {
        let chars = match chars {
            None | Some(Val::None) => None,
            Some(chars) => Some(self.text(chars)?),
        };
        let text = self.text(value)?;
        let start = text.len() - strip(text, chars, at_start, false).len();
        let end = strip(text, chars, false, at_end).len();
        Ok(part(value, start, end.max(start)))
    }

    fn in_case(&mut self, value: Val<'v>, is_upper: bool) -> Result<Val<'v>> {
        let begin = self.scratch.text.len();
        let text = self.text(value)?;
        if !text.is_ascii() {
            // Rare, and not letter by letter: this asks for memory.
            let made = if is_upper { text.to_uppercase() } else { text.to_lowercase() };
            self.scratch.text.push_str(&made);
            return self.made_from(begin);
        }
        self.push_text(value);
        let made = self.scratch.text.get_mut(begin..).unwrap_or_default();
        if is_upper {
            made.make_ascii_uppercase()
        } else {
            made.make_ascii_lowercase()
        }
        self.made_from(begin)
    }

    fn joined(&mut self, list: Val<'v>, between: Val<'v>) -> Result<Val<'v>> {
        self.text(between)?;
        let begin = self.scratch.text.len();
        for index in 0..self.len_of_list(list)? {
            if index > 0 {
                self.push_text(between);
            }
            match self.item(list, index) {
                item @ (Val::Text(_) | Val::Made(..)) => self.push_text(item),
                Val::Int(number) => _ = write!(self.scratch.text, "{number}"),
                _ => return unhandled("a join of other things than texts"),
            }
        }
        self.made_from(begin)
    }

    fn replaced(&mut self, value: Val<'v>, old: Val<'v>, new: Val<'v>) -> Result<Val<'v>> {
        if self.text(old)?.is_empty() {
            return unhandled("a replacement of nothing");
        }
        self.text(new)?;
        let begin = self.scratch.text.len();
        let mut from = 0;
        while let Some(at) = self.found(value, from, old)? {
            self.push_text(part(value, from, at));
            self.push_text(new);
            from = at + self.text(old)?.len();
        }
        if from == 0 {
            return Ok(value);
        }
        let end = self.text(value)?.len();
        self.push_text(part(value, from, end));
        self.made_from(begin)
    }

    /// Where a text is found in another from a byte on.
    fn found(&self, text: Val<'v>, from: usize, what: Val<'v>) -> Result<Option<usize>> {
        let rest = self.text(text)?.get(from..).unwrap_or_default();
        Ok(rest.find(self.text(what)?).map(|at| from + at))
    }

    /// A list of the parts between separators; the last one keeps those beyond `most`.
    fn split(&mut self, value: Val<'v>, separator: Val<'v>, most: usize) -> Result<Val<'v>> {
        let width = self.text(separator)?.len();
        if width == 0 {
            return unhandled("a split at nothing");
        }
        let (had, mut from) = (self.scratch.stack.len(), 0);
        while self.scratch.stack.len() - had < most
            && let Some(at) = self.found(value, from, separator)?
        {
            self.scratch.stack.push(part(value, from, at));
            from = at + width;
        }
        let end = self.text(value)?.len();
        self.scratch.stack.push(part(value, from, end));
        self.list_of(had)
    }

    fn written(&mut self, number: i64) -> Result<Val<'v>> {
        let begin = self.scratch.text.len();
        _ = write!(self.scratch.text, "{number}");
        self.made_from(begin)
    }

    fn json(&mut self, value: Val<'v>) -> Result<Val<'v>> {
        match value {
            Val::None => Ok(Val::Text("null")),
            Val::Bool(true) => Ok(Val::Text("true")),
            Val::Bool(false) => Ok(Val::Text("false")),
            Val::Int(number) => self.written(number),
            Val::Text(text) => {
                let begin = self.scratch.text.len();
                python::write_json_string(&mut self.scratch.text, text, false);
                self.made_from(begin)
            }
            _ => unhandled("the JSON of a value"),
        }
    }

    pub(super) fn test(&mut self, kind: Test, nodes: &'v [Node]) -> Result<bool> {
        let [value, other] = self.eval_args(nodes)?;
        let takes = usize::from(matches!(kind, Test::Eq | Test::Ne | Test::In | Test::DivisibleBy));
        if nodes.len() != 1 + takes {
            return unhandled("a form of test");
        }
        let is_known = !matches!(value, Val::Loop(_) | Val::Macro(_) | Val::Function(_));
        Ok(match kind {
            Test::Defined => !matches!(value, Val::Undefined),
            Test::Undefined => matches!(value, Val::Undefined),
            _ if !is_known => return unhandled("a test of a function"),
            Test::None => matches!(value, Val::None),
            Test::String => matches!(value, Val::Text(_) | Val::Made(..)),
            Test::Number => matches!(value, Val::Int(_) | Val::Bool(_)),
            Test::Integer => matches!(value, Val::Int(_)),
            Test::Boolean => matches!(value, Val::Bool(_)),
            Test::Mapping => matches!(value, Val::Message(_) | Val::Part(_) | Val::Namespace(_)),
            Test::Iterable => !matches!(value, Val::None | Val::Bool(_) | Val::Int(_)),
            Test::Sequence => match value {
                Val::Messages(view) | Val::List(view) => view.is_sequence,
                value => !matches!(value, Val::None | Val::Bool(_) | Val::Int(_)),
            },
            Test::True => matches!(value, Val::Bool(true)),
            Test::False => matches!(value, Val::Bool(false)),
            Test::Eq => self.is_equal(value, other)?,
            Test::Ne => !self.is_equal(value, other)?,
            Test::In => self.is_in(value, other)?,
            Test::Odd | Test::Even | Test::DivisibleBy => {
                let by = match (kind, other) {
                    (Test::DivisibleBy, Val::Int(by)) if by > 0 => by,
                    (Test::DivisibleBy, _) => return unhandled("a form of test"),
                    _ => 2,
                };
                let Val::Int(number) = value else { return unhandled("a test of no number") };
                (number.rem_euclid(by) == 0) != (kind == Test::Odd)
            }
        })
    }

    pub(super) fn method(&mut self, kind: Method, nodes: &'v [Node]) -> Result<Val<'v>> {
        let [of, first, second] = self.eval_args(nodes)?;
        let given = nodes.len() - 1;
        if kind == Method::Get {
            return self.got((of, first), (given == 2).then_some(second), given);
        }
        self.text(of)?;
        let chars = (given == 1).then_some(first);
        match (kind, given) {
            (Method::Strip, 0 | 1) => self.stripped(of, chars, (true, true)),
            (Method::LStrip, 0 | 1) => self.stripped(of, chars, (true, false)),
            (Method::RStrip, 0 | 1) => self.stripped(of, chars, (false, true)),
            (Method::Split, 1) => self.split(of, first, usize::MAX),
            (Method::Split, 2) => match second {
                Val::Int(most) => {
                    self.split(of, first, usize::try_from(most).unwrap_or(usize::MAX))
                }
                _ => unhandled("a form of split"),
            },
            (Method::Replace, 2) => self.replaced(of, first, second),
            (Method::Upper | Method::Lower, 0) => self.in_case(of, kind == Method::Upper),
            (Method::StartsWith, 1) => Ok(Val::Bool(self.text(of)?.starts_with(self.text(first)?))),
            (Method::EndsWith, 1) => Ok(Val::Bool(self.text(of)?.ends_with(self.text(first)?))),
            (Method::RemovePrefix, 1) => {
                let (text, prefix) = (self.text(of)?, self.text(first)?);
                let start = if text.starts_with(prefix) { prefix.len() } else { 0 };
                Ok(part(of, start, text.len()))
            }
            (Method::RemoveSuffix, 1) => {
                let (text, suffix) = (self.text(of)?, self.text(first)?);
                Ok(part(of, 0, text.strip_suffix(suffix).unwrap_or(text).len()))
            }
            _ => unhandled("a form of method"),
        }
    }

    /// `message.get(key, default)`.
    fn got(
        &self,
        (of, key): (Val<'v>, Val<'v>),
        default: Option<Val<'v>>,
        given: usize,
    ) -> Result<Val<'v>> {
        let (Val::Message(_) | Val::Part(_), 1 | 2) = (of, given) else {
            return unhandled("a form of get");
        };
        let name = self.program.name(self.text(key)?);
        let found = name.map_or(Ok(Val::Undefined), |name| self.attribute(of, name))?;
        Ok(match found {
            Val::Undefined => default.unwrap_or(Val::None),
            found => found,
        })
    }
}

/// Whether a value is equal to no list or object.
fn is_scalar(value: Val<'_>) -> bool {
    let texts = matches!(value, Val::Text(_) | Val::Made(..));
    texts || matches!(value, Val::Undefined | Val::None | Val::Bool(_) | Val::Int(_))
}

/// A part of a text, from byte to byte.
fn part(text: Val<'_>, from: usize, to: usize) -> Val<'_> {
    match text {
        Val::Text(text) => Val::Text(text.get(from..to).unwrap_or_default()),
        Val::Made(begin, _) => Val::Made(begin + from as u32, begin + to as u32),
        other => other,
    }
}
