//! What is the next entry of a recording? One JSON object a line, from a file that may end in the
//! middle of one.

use std::io::{BufRead, Read};

use anyhow::{Context, bail, ensure};
use kvroute_core::EndpointId;
use kvroute_core::journal::{Call, ENTRY_BYTES_MAX, End, FORMAT, Header};
use kvroute_core::load::Ticket;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// One entry between the first and the last.
pub(super) enum Line {
    Call(Box<Call<'static>>),
    Added(Option<EndpointId>),
    /// `None`: the request was refused.
    Decided(Option<Then>),
}

/// What a replay must know of a recorded decision.
#[derive(Debug, Deserialize)]
pub(super) struct Then {
    pub ticket: Ticket,
    pub endpoint: EndpointId,
    pub record: ThenRecord,
}

/// The same of its record.
#[derive(Debug, Deserialize)]
pub(super) struct ThenRecord {
    pub endpoint: String,
    pub prompt_tokens: u32,
    pub chosen_tokens: u32,
}

/// An entry as it is written.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Written {
    Recording(Header),
    Call(Box<Call<'static>>),
    Added(Option<EndpointId>),
    Decided(Result<Then, IgnoredAny>),
    End(End),
}

/// Reads line after line.
pub(super) struct Reader<R> {
    input: R,
    header: Header,
    line: Vec<u8>,
    number: u64,
    entries: u64,
    end: Option<End>,
}

impl<R: BufRead> Reader<R> {
    /// Reads the header.
    pub fn new(input: R) -> anyhow::Result<Reader<R>> {
        let header = Header {
            format: 0,
            version: String::new(),
            seed: 0,
            config: String::new(),
            started_unix_s: 0.0,
        };
        let mut reader =
            Reader { input, header, line: Vec::new(), number: 0, entries: 0, end: None };
        let foreign = "this is no recording of `kvroute serve --record`";
        ensure!(reader.read_line()?, "{foreign}: its first line is missing");
        let first: Format = serde_json::from_slice(&reader.line).context(foreign)?;
        let format = first.recording.format;
        ensure!(
            format == FORMAT,
            "the recording is of format {format}, this version reads {FORMAT}: \
             use the version that recorded it"
        );
        let Written::Recording(header) = serde_json::from_slice(&reader.line).context(foreign)?
        else {
            bail!("{foreign}");
        };
        reader.header = header;
        Ok(reader)
    }

    /// The next entry; `None` at the end, or where the file is cut.
    pub fn next(&mut self) -> anyhow::Result<Option<Line>> {
        if !self.read_line()? {
            return Ok(None);
        }
        let number = self.number;
        ensure!(self.end.is_none(), "line {number} comes after the end: the recording is damaged");
        let written = serde_json::from_slice(&self.line)
            .with_context(|| format!("line {number} is damaged or of another version"))?;
        self.entries += 1;
        Ok(Some(match written {
            Written::Call(call) => Line::Call(call),
            Written::Added(id) => Line::Added(id),
            Written::Decided(then) => Line::Decided(then.ok()),
            Written::Recording(_) => bail!("line {number} is a second beginning"),
            Written::End(end) => {
                self.entries -= 1;
                let (told, seen) = (end.entries, self.entries);
                ensure!(told == seen, "lines are missing: {told} were written, {seen} are there");
                self.end = Some(end);
                return self.next();
            }
        }))
    }

    /// The next line, without its end, into `self.line`; whether there is a whole one.
    fn read_line(&mut self) -> anyhow::Result<bool> {
        self.line.clear();
        let max = ENTRY_BYTES_MAX as u64 + 1;
        let mut input = self.input.by_ref().take(max);
        let bytes = input.read_until(b'\n', &mut self.line).context("reading failed")?;
        self.number += 1;
        let whole = self.line.pop_if(|last| *last == b'\n').is_some();
        ensure!(whole || (bytes as u64) < max, "line {} is too long", self.number);
        Ok(whole)
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The bytes of the last entry.
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    pub fn line_number(&self) -> u64 {
        self.number
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }

    pub fn end(&self) -> Option<End> {
        self.end
    }
}

/// As much of a header as every format has.
#[derive(Deserialize)]
struct Format {
    recording: FormatNumber,
}

#[derive(Deserialize)]
struct FormatNumber {
    format: u32,
}
