//! How large is a picture, by the first bytes of its file?
//!
//! The file is base64 text, of which only the few bytes that tell are decoded. Formats: PNG
//! (IHDR), GIF (logical screen), JPEG (ITU T.81: the frame header), WebP (RFC 9649: VP8, VP8L and
//! VP8X).

/// Most segments before a JPEG's frame header. Photographs have up to some dozen.
const JPEG_SEGMENTS_MAX: usize = 256;

/// Width and height; `None` when the text is not base64, or the file is of another format, cut
/// off, or empty.
pub(super) fn of_base64(text: &str) -> Option<(u32, u32)> {
    let file = File { text: text.as_bytes() };
    let (width, height) = match file.bytes::<4>(0)? {
        [0x89, b'P', b'N', b'G'] => png(&file)?,
        [b'G', b'I', b'F', b'8'] => gif(&file)?,
        [b'R', b'I', b'F', b'F'] => webp(&file)?,
        [0xff, 0xd8, ..] => jpeg(&file)?,
        _ => return None,
    };
    (width > 0 && height > 0).then_some((width, height))
}

/// The bytes that a base64 text stands for, decoded where they are asked for.
struct File<'a> {
    text: &'a [u8],
}

impl File<'_> {
    /// `N` bytes from `at`; `None` beyond the end, and where the text is no base64.
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        for (offset, byte) in bytes.iter_mut().enumerate() {
            *byte = self.byte(at.checked_add(offset)?)?;
        }
        Some(bytes)
    }

    fn byte(&self, at: usize) -> Option<u8> {
        let first = (at / 3).checked_mul(4)?.checked_add(at % 3)?;
        let pair = self.text.get(first..first.checked_add(2)?)?;
        let (high, low) = (sextet(pair[0])?, sextet(pair[1])?);
        Some(match at % 3 {
            0 => high << 2 | low >> 4,
            1 => high << 4 | low >> 2,
            _ => high << 6 | low,
        })
    }
}

fn sextet(byte: u8) -> Option<u8> {
    match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    }
}

fn png(file: &File<'_>) -> Option<(u32, u32)> {
    if file.bytes::<8>(8)?[4..] != *b"IHDR" {
        return None;
    }
    let side = |at| file.bytes(at).map(u32::from_be_bytes);
    Some((side(16)?, side(20)?))
}

fn gif(file: &File<'_>) -> Option<(u32, u32)> {
    let side = |at| file.bytes(at).map(u16::from_le_bytes).map(u32::from);
    Some((side(6)?, side(8)?))
}

fn webp(file: &File<'_>) -> Option<(u32, u32)> {
    if file.bytes::<4>(8)? != *b"WEBP" {
        return None;
    }
    match &file.bytes::<4>(12)? {
        // Sides less one, in 24 bits each.
        b"VP8X" => {
            let [a, b, c, d, e, f] = file.bytes::<6>(24)?;
            let side = |bytes: [u8; 3]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]) + 1;
            Some((side([a, b, c]), side([d, e, f])))
        }
        // Sides less one, in 14 bits each, behind a signature.
        b"VP8L" if file.byte(20)? == 0x2f => {
            let bits = u32::from_le_bytes(file.bytes(21)?);
            Some(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
        }
        // 14 bits each, behind the start code of a key frame.
        b"VP8 " if file.bytes::<3>(23)? == [0x9d, 0x01, 0x2a] => {
            let side =
                |at| file.bytes(at).map(|bytes| u32::from(u16::from_le_bytes(bytes) & 0x3fff));
            Some((side(26)?, side(28)?))
        }
        _ => None,
    }
}

fn jpeg(file: &File<'_>) -> Option<(u32, u32)> {
    let mut at = 2;
    for _ in 0..JPEG_SEGMENTS_MAX {
        let [0xff, marker] = file.bytes::<2>(at)? else { return None };
        match marker {
            // A fill byte.
            0xff => at += 1,
            // Markers that stand alone.
            0x01 | 0xd0..=0xd8 => at += 2,
            // The end of the picture, or its data: no frame header came before.
            0xd9 | 0xda => return None,
            // Frame headers; the numbers left out are tables.
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let side = |at| file.bytes(at).map(u16::from_be_bytes).map(u32::from);
                return Some((side(at + 7)?, side(at + 5)?));
            }
            _ => {
                let length = usize::from(u16::from_be_bytes(file.bytes(at + 2)?));
                at += 2 + length.max(2);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use kvroute_core::Rng;

    use super::*;

    fn base64(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for chunk in bytes.chunks(3) {
            let bits = chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
            let bits = bits << (8 * (3 - chunk.len()));
            for at in 0..4 {
                let digit = DIGITS[(bits >> (18 - 6 * at) & 63) as usize];
                text.push(if at <= chunk.len() { char::from(digit) } else { '=' });
            }
        }
        text
    }

    fn files() -> Vec<(&'static str, Vec<u8>, (u32, u32))> {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend_from_slice(&[0, 0, 4, 0, 0, 0, 2, 1, 8, 2]);
        let gif = b"GIF89a\x40\x01\xc8\x00\xf7\0\0".to_vec();
        let mut jpeg = vec![0xff, 0xd8, 0xff, 0xe0, 0, 16];
        jpeg.extend_from_slice(&[b'J'; 14]);
        // A large block of metadata, fill bytes, a table whose number is near those of frames.
        jpeg.extend_from_slice(&[0xff, 0xe1, 0xff, 0xff]);
        jpeg.extend_from_slice(&[0xc0; 65_533]);
        jpeg.extend_from_slice(&[0xff, 0xff, 0xff, 0xc4, 0, 4, 1, 2]);
        jpeg.extend_from_slice(&[0xff, 0xc2, 0, 17, 8, 1, 0x2c, 2, 0x58, 3]);
        let riff = |kind: &[u8; 4], data: &[u8]| {
            let mut file = b"RIFF\x50\0\0\0WEBP".to_vec();
            file.extend_from_slice(kind);
            file.extend_from_slice(&[30, 0, 0, 0]);
            file.extend_from_slice(data);
            file
        };
        let lossless = (0x2f, (799u32 | 599 << 14).to_le_bytes());
        let mut vp8l = vec![lossless.0];
        vp8l.extend_from_slice(&lossless.1);
        vec![
            ("png", png, (1024, 513)),
            ("gif", gif, (320, 200)),
            ("jpeg", jpeg, (600, 300)),
            ("vp8x", riff(b"VP8X", &[0, 0, 0, 0, 0xff, 0x01, 0, 0x8f, 0x01, 0]), (512, 400)),
            ("vp8l", riff(b"VP8L", &vp8l), (800, 600)),
            ("vp8", riff(b"VP8 ", &[1, 2, 3, 0x9d, 1, 0x2a, 0x80, 0x42, 0xe0, 1]), (640, 480)),
        ]
    }

    #[test]
    fn sizes_of_every_format() {
        for (name, file, pixels) in files() {
            assert_eq!(of_base64(&base64(&file)), Some(pixels), "{name}");
        }
    }

    #[test]
    fn what_is_cut_off_or_something_else_has_no_size() {
        for (name, file, _) in files() {
            for length in (0..file.len().min(40)).chain([file.len() - 8]) {
                let size = of_base64(&base64(&file[..length]));
                // A header is complete a little before the file is.
                let may_be = length + 4 >= file.len().min(40);
                assert!(size.is_none() || may_be, "{name} cut at {length}: {size:?}");
            }
        }
        for text in ["", "AAAA", "not base64!", "iVBO Rw0K", "iVBORw0KGgoAAAANSUhEUg\u{e4}"] {
            assert_eq!(of_base64(text), None, "{text}");
        }
        let empty = base64(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\0\0\0\0\x01");
        assert_eq!(of_base64(&empty), None);
        let ended = base64(&[0xff, 0xd8, 0xff, 0xda, 0, 4, 0, 0, 0xff, 0xc0, 0, 17, 8, 0, 1, 0, 1]);
        assert_eq!(of_base64(&ended), None);
    }

    #[test]
    fn damage_never_panics_or_loops() {
        for (_, file, _) in files() {
            for seed in 0..300 {
                let mut rng = Rng::seeded(seed);
                let mut damaged = file[..file.len().min(64)].to_vec();
                for _ in 0..1 + rng.below(6) {
                    let at = rng.below(damaged.len());
                    damaged[at] = rng.next_u64() as u8;
                }
                of_base64(&base64(&damaged));
            }
        }
        let endless = base64(&[0xff; 3000]);
        assert_eq!(of_base64(&format!("/9j/{endless}")), None);
    }
}
