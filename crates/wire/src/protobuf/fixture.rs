//! Writes messages for tests.

/// A message that is written field by field.
#[derive(Clone, Debug, Default)]
pub(crate) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// An empty message.
    pub(crate) fn new() -> Message {
        Message::default()
    }

    /// Adds an integer field.
    #[must_use]
    pub(crate) fn varint(mut self, number: u32, value: u64) -> Message {
        push_varint(&mut self.bytes, u64::from(number) << 3);
        push_varint(&mut self.bytes, value);
        self
    }

    /// Adds a field of bytes: a string, a message, a packed list.
    #[must_use]
    pub(crate) fn bytes(mut self, number: u32, value: &[u8]) -> Message {
        push_varint(&mut self.bytes, u64::from(number) << 3 | 2);
        push_varint(&mut self.bytes, value.len() as u64);
        self.bytes.extend_from_slice(value);
        self
    }

    /// Adds a packed list of integers.
    #[must_use]
    pub(crate) fn packed(self, number: u32, values: &[u32]) -> Message {
        let mut list = Vec::new();
        values.iter().for_each(|value| push_varint(&mut list, u64::from(*value)));
        self.bytes(number, &list)
    }

    /// The message's bytes.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The message in a gRPC frame.
    pub(crate) fn into_frame(self) -> Vec<u8> {
        let mut frame = vec![0];
        frame.extend_from_slice(&(self.bytes.len() as u32).to_be_bytes());
        frame.extend_from_slice(&self.bytes);
        frame
    }
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}
