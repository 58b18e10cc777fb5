//! Which service does a health check ask about, and what is it told?
//!
//! Messages of `grpc.health.v1.Health`; source: grpc/doc/health-checking.md and
//! grpc/health/v1/health.proto.

use thiserror::Error;

use crate::protobuf::{Fields, ProtobufError};

/// The method that is asked once.
pub const CHECK: &str = "/grpc.health.v1.Health/Check";
/// The method that tells of changes.
pub const WATCH: &str = "/grpc.health.v1.Health/Watch";

/// How a service is, as `ServingStatus` numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServingStatus {
    /// It takes requests.
    Serving = 1,
    /// It takes none now.
    NotServing = 2,
    /// There is no such service; only those who watch are told so.
    ServiceUnknown = 3,
}

/// Why a request cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum HealthError {
    /// It is no message.
    #[error("the request is no HealthCheckRequest: {0}")]
    Protobuf(#[from] ProtobufError),
    /// The service's name is not UTF-8.
    #[error("the service's name is not UTF-8")]
    Name,
}

/// The service that a `HealthCheckRequest` asks about; empty: the server as a whole.
///
/// # Errors
/// [`HealthError`]
pub fn service(request: &[u8]) -> Result<&str, HealthError> {
    let mut name: &[u8] = b"";
    for field in Fields::new(request) {
        if let (1, value) = field? {
            name = value.bytes();
        }
    }
    std::str::from_utf8(name).map_err(|_| HealthError::Name)
}

/// A `HealthCheckResponse`.
pub fn response(status: ServingStatus) -> [u8; 2] {
    // Field 1, an integer below 128.
    [0x08, status as u8]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protobuf::fixture::Message;

    #[test]
    fn names_of_services() {
        assert_eq!(service(b""), Ok(""));
        assert_eq!(service(b"\x0a\x08liveness"), Ok("liveness"));
        let named = |name: &[u8]| Message::new().bytes(1, name);
        // The last of several counts, as in any protobuf message; unknown fields do not.
        let twice = named(b"a").varint(9, 1).bytes(1, b"b").into_bytes();
        assert_eq!(service(&twice), Ok("b"));
        assert_eq!(service(&named(b"\xff").into_bytes()), Err(HealthError::Name));
        assert_eq!(service(b"\x0a\x08live"), Err(ProtobufError::Truncated.into()));
        assert_eq!(service(&Message::new().varint(1, 7).into_bytes()), Ok(""));
    }

    #[test]
    fn answers_are_messages() {
        use ServingStatus::*;
        for (status, number) in [(Serving, 1), (NotServing, 2), (ServiceUnknown, 3)] {
            let expected = Message::new().varint(1, number).into_bytes();
            assert_eq!(response(status), expected[..]);
        }
    }
}
