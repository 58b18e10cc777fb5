//! What does an expression of a chat template give, in a few words and without owning anything?

use kvroute_wire::request::{PlainTurn, emptied};

use super::{CONTENT, Global, Name, ROLE, TEXT, TOOLS, TYPE};
use crate::messages::{BILLING_HEADER, ContentFormat};

/// A value. Texts belong to the request or the program, or stand in [`Scratch::text`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Val<'v> {
    Undefined,
    None,
    Bool(bool),
    Int(i64),
    Text(&'v str),
    /// Begin and end in [`Scratch::text`].
    Made(u32, u32),
    Messages(View),
    /// Of [`Scratch::items`].
    List(View),
    /// By its place in the conversation.
    Message(u32),
    /// The content of a message as a list of its one part.
    Parts(u32),
    Part(u32),
    /// By its number.
    Namespace(u32),
    /// By its depth.
    Loop(u32),
    Macro(u16),
    Function(Global),
}

/// Which items of a list, in which order.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) first: u32,
    pub(super) len: u32,
    pub(super) is_reversed: bool,
    /// Slices are iterables, not sequences.
    pub(super) is_sequence: bool,
}

impl View {
    /// All of a list of `len` items from `first` on.
    pub(super) fn all(first: u32, len: u32) -> View {
        View { first, len, is_reversed: false, is_sequence: true }
    }

    /// The place of an item.
    pub(super) fn at(self, index: u32) -> Option<u32> {
        let offset =
            if self.is_reversed { self.len.checked_sub(index)?.checked_sub(1)? } else { index };
        (index < self.len).then(|| self.first + offset)
    }

    /// `len` of its items from the one at `from` on; both are within it.
    pub(super) fn part(self, from: u32, len: u32) -> View {
        let skipped = if self.is_reversed { self.len - from - len } else { from };
        View { first: self.first + skipped, len, is_sequence: false, ..self }
    }

    pub(super) fn reversed(self) -> View {
        View { is_reversed: !self.is_reversed, is_sequence: false, ..self }
    }
}

/// A round of a loop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round<'v> {
    pub(super) items: Val<'v>,
    pub(super) index: u32,
    pub(super) len: u32,
}

/// What a template is given.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conversation<'v> {
    turns: &'v [PlainTurn<'v>],
    format: ContentFormat,
}

impl<'v> Conversation<'v> {
    /// The messages as vLLM hands them to the template; `None` where it does more with them than
    /// passing roles and texts on. `knows_developer`: the template knows that role.
    pub(crate) fn of(
        turns: &'v [PlainTurn<'v>],
        format: ContentFormat,
        knows_developer: bool,
    ) -> Option<Conversation<'v>> {
        let is_plain = |turn: &PlainTurn<'_>| match &*turn.role {
            "system" => !turn.content.starts_with(BILLING_HEADER),
            "developer" => knows_developer,
            _ => true,
        };
        let is_plain = u32::try_from(turns.len()).is_ok() && turns.iter().all(is_plain);
        is_plain.then_some(Conversation { turns, format })
    }

    pub(super) fn all(self) -> Val<'v> {
        Val::Messages(View::all(0, self.turns.len() as u32))
    }

    /// A field of a message; [`Val::Undefined`] if it has none of this name.
    pub(super) fn field(self, message: u32, name: Name) -> Val<'v> {
        let Some(turn) = self.turns.get(message as usize) else { return Val::Undefined };
        match name {
            ROLE => Val::Text(&turn.role),
            // A tool's answer is one string for any template.
            CONTENT if self.format == ContentFormat::Parts && turn.role != "tool" => {
                Val::Parts(message)
            }
            CONTENT => Val::Text(&turn.content),
            TOOLS if turn.role == "developer" => Val::None,
            _ => Val::Undefined,
        }
    }

    /// A field of the one part of a message.
    pub(super) fn part_field(self, message: u32, name: Name) -> Val<'v> {
        let turn = self.turns.get(message as usize);
        match (name, turn) {
            (TYPE, Some(_)) => Val::Text("text"),
            (TEXT, Some(turn)) => Val::Text(&turn.content),
            _ => Val::Undefined,
        }
    }
}

/// Memory of a run, which is used again by the next one.
#[derive(Debug, Default)]
pub(crate) struct Scratch<'v> {
    /// Texts that the template makes.
    pub(super) text: String,
    /// Variables of the request, by name.
    pub(super) context: Vec<Val<'v>>,
    /// Variables of the template, those of inner scopes behind those of outer ones.
    pub(super) locals: Vec<(Name, Val<'v>)>,
    /// Items of the lists that the template makes.
    pub(super) items: Vec<Val<'v>>,
    /// Operands of what is being evaluated.
    pub(super) stack: Vec<Val<'v>>,
    /// The loops around what is being run.
    pub(super) rounds: Vec<Round<'v>>,
    /// Attributes of namespaces.
    pub(super) fields: Vec<(u32, Name, Val<'v>)>,
}

impl Scratch<'_> {
    /// About how much memory it has.
    pub(crate) fn bytes(&self) -> usize {
        let values = self.items.capacity() + self.locals.capacity() + self.fields.capacity();
        self.text.capacity() + values * size_of::<Val<'_>>()
    }

    /// Empty, for values of any other request; the memory stays.
    pub(crate) fn emptied<'a>(mut self) -> Scratch<'a> {
        self.text.clear();
        Scratch {
            text: self.text,
            context: emptied(self.context),
            locals: emptied(self.locals),
            items: emptied(self.items),
            stack: emptied(self.stack),
            rounds: emptied(self.rounds),
            fields: emptied(self.fields),
        }
    }
}
