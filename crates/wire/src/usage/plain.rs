//! How is a usage object read that looks like those of engines? Names without escapes, whole
//! numbers, `null`, objects of these: once over its bytes. Whatever else there is reads serde.

use super::{Details, UsageObject};

/// Most levels of objects; engines' have two.
const DEPTH_MAX: u32 = 4;

/// The object; `None`: it is of another form, or none at all.
pub(super) fn read(json: &[u8]) -> Option<UsageObject> {
    let mut object = UsageObject::default();
    let (mut prompt_details, mut input_details) = (None, None);
    let mut seen = 0u32;
    let mut reader = Reader { rest: json };
    reader.members(DEPTH_MAX, &mut |reader, key, depth| {
        let field = match key {
            b"prompt_tokens" => &mut object.prompt_tokens,
            b"completion_tokens" => &mut object.completion_tokens,
            b"input_tokens" => &mut object.input_tokens,
            b"output_tokens" => &mut object.output_tokens,
            b"cache_read_input_tokens" => &mut object.cache_read_input_tokens,
            b"cache_creation_input_tokens" => &mut object.cache_creation_input_tokens,
            b"cached_tokens" => &mut object.cached_tokens,
            b"prompt_tokens_details" => {
                once(&mut seen, 7)?;
                return reader.details(depth, &mut prompt_details);
            }
            b"input_tokens_details" => {
                once(&mut seen, 8)?;
                return reader.details(depth, &mut input_details);
            }
            _ => return reader.any(depth),
        };
        let place = match key {
            b"prompt_tokens" => 0,
            b"completion_tokens" => 1,
            b"input_tokens" => 2,
            b"output_tokens" => 3,
            b"cache_read_input_tokens" => 4,
            b"cache_creation_input_tokens" => 5,
            _ => 6,
        };
        once(&mut seen, place)?;
        *field = reader.number()?;
        Some(())
    })?;
    reader.skip_space();
    (object.prompt_tokens_details, object.input_tokens_details) = (prompt_details, input_details);
    reader.rest.is_empty().then_some(object)
}

/// Nothing if the field of this number has been there before.
fn once(seen: &mut u32, field: u32) -> Option<()> {
    let before = *seen;
    *seen |= 1 << field;
    (before != *seen).then_some(())
}

struct Reader<'a> {
    rest: &'a [u8],
}

/// What is done at each value: by key and the levels that may still begin.
type OnValue<'f, 'a> = &'f mut dyn FnMut(&mut Reader<'a>, &'a [u8], u32) -> Option<()>;

impl<'a> Reader<'a> {
    fn skip_space(&mut self) {
        while let [b' ' | b'\t' | b'\r' | b'\n', rest @ ..] = self.rest {
            self.rest = rest;
        }
    }

    /// The next byte that is no white space, if it is this one.
    fn take(&mut self, wanted: u8) -> Option<()> {
        self.skip_space();
        let (first, rest) = self.rest.split_first()?;
        (*first == wanted).then(|| self.rest = rest)
    }

    /// All members of an object; `on_value` stands before each value.
    fn members(&mut self, depth: u32, on_value: OnValue<'_, 'a>) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        self.take(b'{')?;
        if self.take(b'}').is_some() {
            return Some(());
        }
        loop {
            let key = self.key()?;
            self.take(b':')?;
            self.skip_space();
            on_value(self, key, depth)?;
            if self.take(b'}').is_some() {
                return Some(());
            }
            self.take(b',')?;
        }
    }

    /// A key of plain ASCII.
    fn key(&mut self) -> Option<&'a [u8]> {
        self.take(b'"')?;
        let end = self.rest.iter().position(|byte| !matches!(byte, b'a'..=b'z' | b'_'))?;
        let (key, rest) = self.rest.split_at(end);
        self.rest = rest.strip_prefix(b"\"")?;
        Some(key)
    }

    /// A whole number without a sign, or `null`.
    fn number(&mut self) -> Option<Option<u32>> {
        if let Some(rest) = self.rest.strip_prefix(b"null") {
            self.rest = rest;
            return Some(None);
        }
        let digits = self.rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (number, rest) = self.rest.split_at(digits);
        if digits > 1 && number[0] == b'0' {
            return None;
        }
        let begin = (digits > 0).then_some(0u32)?;
        let append = |n: u32, byte: &u8| n.checked_mul(10)?.checked_add(u32::from(byte - b'0'));
        let value = number.iter().try_fold(begin, append)?;
        self.rest = rest;
        Some(Some(value))
    }

    fn any(&mut self, depth: u32) -> Option<()> {
        match self.rest.first()? {
            b'{' => self.members(depth, &mut |reader, _, depth| reader.any(depth)),
            _ => self.number().map(drop),
        }
    }

    fn details(&mut self, depth: u32, into: &mut Option<Details>) -> Option<()> {
        if self.rest.first()? != &b'{' {
            return self.number()?.is_none().then_some(());
        }
        let (mut details, mut seen) = (Details { cached_tokens: None }, 0);
        self.members(depth, &mut |reader, key, depth| match key {
            b"cached_tokens" => {
                once(&mut seen, 0)?;
                details.cached_tokens = reader.number()?;
                Some(())
            }
            _ => reader.any(depth),
        })?;
        *into = Some(details);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use kvroute_core::Rng;

    use super::*;

    const VLLM: &str = r#"{"prompt_tokens":2,"total_tokens":6,"completion_tokens":4,
        "prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":null,
        "multimodal_tokens":null},"completion_tokens_details":null}"#;

    #[test]
    fn the_form_of_engines_is_read() {
        let sglang = r#"{"prompt_tokens":1,"cached_tokens":7}"#;
        let nested = r#"{ "input_tokens" : 3 , "cost":{"a":{"b":1}}, "output_tokens":0 }"#;
        for text in [VLLM, sglang, nested, "{}", " {\n} "] {
            assert_eq!(read(text.as_bytes()), serde_json::from_str(text).ok(), "{text}");
            assert!(read(text.as_bytes()).is_some(), "{text}");
        }
    }

    #[test]
    fn other_forms_are_left_to_serde() {
        for text in [
            "",
            "{",
            "null",
            "[]",
            "{}}",
            r#"{"a":1,}"#,
            r#"{"a":01}"#,
            r#"{"a":-1}"#,
            r#"{"a":1.5}"#,
            r#"{"a":4294967296}"#,
            r#"{"a":"b"}"#,
            r#"{"a":[1]}"#,
            r#"{"a":true}"#,
            r#"{"a\u0062":1}"#,
            r#"{"prompt_tokens":1,"prompt_tokens":2}"#,
            r#"{"prompt_tokens_details":1}"#,
            r#"{"a":{"a":{"a":{"a":{"a":1}}}}}"#,
        ] {
            assert_eq!(read(text.as_bytes()), None, "{text}");
        }
    }

    /// Whatever is read is what serde reads.
    #[test]
    fn changed_objects_are_never_read_otherwise() {
        let mut rng = Rng::seeded(7);
        let bytes = b"{}\":,0123456789nul_.-+ e\\a";
        let mut read_here = 0;
        for _ in 0..20_000 {
            let mut text = VLLM.as_bytes().to_vec();
            for _ in 0..=rng.below(3) {
                let at = rng.below(text.len());
                match rng.below(3) {
                    0 => text[at] = bytes[rng.below(bytes.len())],
                    1 => drop(text.remove(at)),
                    _ => text.insert(at, bytes[rng.below(bytes.len())]),
                }
            }
            if let Some(object) = read(&text) {
                read_here += 1;
                let shown = String::from_utf8_lossy(&text);
                assert_eq!(Some(object), serde_json::from_slice(&text).ok(), "{shown}");
            }
        }
        assert!(read_here > 100, "{read_here}");
    }
}
