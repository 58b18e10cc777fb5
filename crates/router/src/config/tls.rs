//! How is a listener to speak TLS?

use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Certificate and key, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
}

/// How a listener speaks TLS; by default it does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerTls {
    /// What clients are shown.
    pub certificate: ServerCertificate,
    /// The oldest version that is spoken.
    pub min_version: TlsVersion,
    /// What TLS 1.2 may use; empty: everything that is known. TLS 1.3 has its own suites, which
    /// cannot be chosen.
    pub cipher_suites: Vec<CipherSuite>,
    /// Clients need a certificate of one of the authorities in this file (PEM).
    pub client_ca: Option<PathBuf>,
}

/// Where a listener has its certificate from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ServerCertificate {
    /// There is none: plain TCP.
    #[default]
    Off,
    /// Made at the start, for clients that do not verify it.
    SelfSigned,
    /// Read from files.
    Files {
        /// The files.
        files: TlsFiles,
        /// They are looked at every second, and read again when they change.
        reload: bool,
    },
}

/// A version of TLS, by Go's name of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersion {
    /// `VersionTLS10`; not spoken, TLS 1.2 stands in.
    Tls10,
    /// `VersionTLS11`; not spoken, TLS 1.2 stands in.
    Tls11,
    /// `VersionTLS12`.
    #[default]
    Tls12,
    /// `VersionTLS13`.
    Tls13,
}

/// A cipher suite, by Go's name of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSuite {
    name: &'static str,
    number: u16,
}

/// Names from IANA's registry of TLS parameters, which are also Go's; numbers from there. The two
/// that end in `POLY1305` are older names of Go's.
const CIPHER_SUITES: [(&str, u16); 11] = [
    ("TLS_AES_128_GCM_SHA256", 0x1301),
    ("TLS_AES_256_GCM_SHA384", 0x1302),
    ("TLS_CHACHA20_POLY1305_SHA256", 0x1303),
    ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", 0xc02b),
    ("TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", 0xc02c),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305", 0xcca9),
    ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", 0xcca9),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", 0xc02f),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", 0xc030),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305", 0xcca8),
    ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", 0xcca8),
];

/// What is wrong with the name of a version or a cipher suite.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TlsNameError {
    /// No version.
    #[error("`{0}` is no version of TLS; valid: VersionTLS12 VersionTLS13")]
    Version(String),
    /// No cipher suite, or one that is broken or without forward secrecy.
    #[error(
        "`{0}` is not a cipher suite that is spoken here (those with CBC, RC4, 3DES or without \
         ECDHE are not); valid: {valid}",
        valid = CIPHER_SUITES.map(|(name, _)| name).join(" ")
    )]
    CipherSuite(String),
}

impl ServerTls {
    /// A certificate from files that are read again when they change, or plain TCP without them.
    pub fn from_files(files: Option<TlsFiles>) -> ServerTls {
        let certificate = match files {
            Some(files) => ServerCertificate::Files { files, reload: true },
            None => ServerCertificate::Off,
        };
        ServerTls { certificate, ..ServerTls::default() }
    }
}

impl FromStr for TlsVersion {
    type Err = TlsNameError;

    fn from_str(name: &str) -> Result<TlsVersion, TlsNameError> {
        match name {
            "VersionTLS10" => Ok(TlsVersion::Tls10),
            "VersionTLS11" => Ok(TlsVersion::Tls11),
            "VersionTLS12" => Ok(TlsVersion::Tls12),
            "VersionTLS13" => Ok(TlsVersion::Tls13),
            _ => Err(TlsNameError::Version(name.to_owned())),
        }
    }
}

impl CipherSuite {
    /// Go's name.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Go's names of suites by IANA's numbers; of two names the one that is also IANA's.
    #[cfg(feature = "tls")]
    pub(crate) fn names(numbers: &[u16]) -> Vec<&'static str> {
        let named = CIPHER_SUITES.iter().filter(|(_, number)| numbers.contains(number));
        named.map(|(name, _)| *name).filter(|name| !name.ends_with("POLY1305")).collect()
    }

    /// IANA's number.
    pub fn number(self) -> u16 {
        self.number
    }
}

impl FromStr for CipherSuite {
    type Err = TlsNameError;

    fn from_str(name: &str) -> Result<CipherSuite, TlsNameError> {
        let found = CIPHER_SUITES.iter().find(|(known, _)| *known == name);
        let suite = found.map(|&(name, number)| CipherSuite { name, number });
        suite.ok_or_else(|| TlsNameError::CipherSuite(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_go_writes_them() {
        let table = [
            ("VersionTLS10", TlsVersion::Tls10),
            ("VersionTLS11", TlsVersion::Tls11),
            ("VersionTLS12", TlsVersion::Tls12),
            ("VersionTLS13", TlsVersion::Tls13),
        ];
        for (name, version) in table {
            assert_eq!(name.parse(), Ok(version));
        }
        for name in ["", "TLS12", "versiontls12", "VersionTLS14"] {
            assert_eq!(name.parse::<TlsVersion>(), Err(TlsNameError::Version(name.into())));
        }
        let suite: CipherSuite = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256".parse().unwrap();
        assert_eq!((suite.number(), suite.name().len()), (0xc02f, 37));
        for name in ["", "tls_aes_128_gcm_sha256", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"] {
            let error = name.parse::<CipherSuite>().unwrap_err();
            assert!(error.to_string().contains(" TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256"));
            assert_eq!(error, TlsNameError::CipherSuite(name.into()));
        }
    }
}
