//! Which certificate is a client shown? One that is made at the start, or one from files, which
//! can change while the router runs. And why do handshakes fail?

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{
    ClientHello, ResolvesServerCert, ServerConfig, WebPkiClientVerifier,
};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{
    RootCertStore, SupportedCipherSuite, SupportedProtocolVersion, version,
};
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

use crate::config::{CipherSuite, ServerCertificate, ServerTls, TlsFiles, TlsVersion};
use crate::metrics::{ReasonLabel, ResultLabel};

/// How often files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Changed files are used once they have stayed the same for this long: the two of a pair are
/// seldom written at once.
const QUIET: Duration = Duration::from_millis(250);
/// Largest file that is read.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// How long a certificate of our own is valid, in days.
const SELF_SIGNED_DAYS: u64 = 10 * 365;
/// Since when it is valid, before now: clocks differ.
const SELF_SIGNED_BEFORE: Duration = Duration::from_secs(3600);

/// Shakes hands with clients.
#[derive(Clone)]
pub(crate) struct Server {
    acceptor: TlsAcceptor,
    files: Option<Arc<WatchedFiles>>,
    failures: Arc<Failures>,
}

/// Handshakes that failed, by kind.
#[derive(Default)]
struct Failures {
    /// Set when there are metrics, which is before anybody connects.
    counted: OnceLock<Family<ReasonLabel, Counter>>,
    told: Mutex<BTreeSet<&'static str>>,
}

impl Failures {
    fn note(&self, reason: &'static str, error: &io::Error) {
        if let Some(counted) = self.counted.get() {
            counted.get_or_create(&ReasonLabel { reason }).inc();
        }
        if self.told.lock().insert(reason) {
            warn!(
                reason,
                %error,
                "A TLS handshake failed; more of this kind are only counted \
                 (kvroute_tls_handshake_failures_total)."
            );
        }
    }
}

impl Server {
    /// The error says what cannot be used.
    pub fn new(tls: &ServerTls, alpn: &[&str]) -> Result<Server, String> {
        match &tls.certificate {
            ServerCertificate::Off => Err("there is no certificate".to_owned()),
            ServerCertificate::SelfSigned => {
                let made = self_signed()?;
                fits(tls, &made)?;
                Ok(Server::of(acceptor(tls, alpn, shown(made))?, None))
            }
            ServerCertificate::Files { files, reload } => {
                let used = Pair::read(files)?;
                let certified = used.certified(files)?;
                fits(tls, &certified)?;
                let shown = shown(certified);
                let acceptor = acceptor(tls, alpn, Arc::clone(&shown))?;
                let (files, tls) = (files.clone(), tls.clone());
                let watched = reload.then(|| WatchedFiles { files, tls, used, shown });
                Ok(Server::of(acceptor, watched))
            }
        }
    }

    fn of(acceptor: TlsAcceptor, files: Option<WatchedFiles>) -> Server {
        Server { acceptor, files: files.map(Arc::new), failures: Arc::default() }
    }

    /// Shakes hands within `patience`. A failure is counted, and the first of each kind logged.
    pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        patience: Duration,
    ) -> io::Result<TlsStream<S>> {
        let (reason, error) =
            match tokio::time::timeout(patience, self.acceptor.accept(stream)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => (failure(&error), error),
                Err(late) => ("timeout", late.into()),
            };
        self.failures.note(reason, &error);
        Err(error)
    }

    /// From here on failures are counted there.
    pub fn count_failures(&self, counted: Family<ReasonLabel, Counter>) {
        // Once is enough: there is one page of metrics.
        let _set = self.failures.counted.set(counted);
    }

    /// The files, if they are to be looked after.
    pub fn files(&self) -> Option<Arc<WatchedFiles>> {
        self.files.clone()
    }
}

/// The kind of a failed handshake, as a label.
fn failure(error: &io::Error) -> &'static str {
    use tokio_rustls::rustls::Error;
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        None => "broken",
        Some(Error::PeerIncompatible(_)) => "incompatible",
        Some(Error::NoApplicationProtocol) => "application_protocol",
        Some(Error::InvalidCertificate(_) | Error::NoCertificatesPresented) => "client_certificate",
        Some(Error::AlertReceived(_)) => "refused_by_client",
        Some(Error::InvalidMessage(_)) => "not_tls",
        Some(_) => "other",
    }
}

/// The certificate that new handshakes get.
struct Shown(ArcSwap<CertifiedKey>);

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown")
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

fn shown(key: CertifiedKey) -> Arc<Shown> {
    Arc::new(Shown(ArcSwap::from_pointee(key)))
}

fn acceptor(tls: &ServerTls, alpn: &[&str], shown: Arc<Shown>) -> Result<TlsAcceptor, String> {
    let provider = Arc::new(provider(tls));
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions(tls.min_version))
        .map_err(|e| e.to_string())?;
    let builder = match &tls.client_ca {
        Some(file) => builder.with_client_cert_verifier(client_verifier(file, provider)?),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(shown);
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(Arc::new(config).into())
}

/// Lets in who has a certificate of an authority in the file.
fn client_verifier(
    file: &Path,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut authorities = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&read_pem(file)?) {
        let certificate = certificate.map_err(|e| wrong(file, &e))?;
        authorities.add(certificate).map_err(|e| wrong(file, &e))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider)
        .build()
        .map_err(|e| wrong(file, &e))
}

fn versions(min: TlsVersion) -> &'static [&'static SupportedProtocolVersion] {
    static BOTH: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];
    match min {
        TlsVersion::Tls13 => &BOTH[..1],
        TlsVersion::Tls12 => &BOTH,
        TlsVersion::Tls10 | TlsVersion::Tls11 => {
            warn!("TLS 1.0 and 1.1 are not spoken; clients need TLS 1.2 or later.");
            &BOTH
        }
    }
}

/// The cipher suites of TLS 1.2 that were chosen, and all of TLS 1.3.
fn provider(tls: &ServerTls) -> CryptoProvider {
    let mut provider = ring::default_provider();
    if !tls.cipher_suites.is_empty() {
        provider.cipher_suites.retain(|suite| {
            let number = u16::from(suite.suite());
            suite.tls13().is_some() || tls.cipher_suites.iter().any(|c| c.number() == number)
        });
    }
    provider
}

/// Whether clients of TLS 1.2 can agree with this key on one of the chosen cipher suites, where any
/// of that version are chosen; the error names those that they could.
fn fits(tls: &ServerTls, key: &CertifiedKey) -> Result<(), String> {
    let all = ring::default_provider().cipher_suites;
    let is_chosen = |suite: &SupportedCipherSuite| {
        let number = u16::from(suite.suite());
        tls.cipher_suites.iter().any(|chosen| chosen.number() == number)
    };
    let kind = key.key.algorithm();
    let fit = |suite: &&SupportedCipherSuite| {
        suite.tls13().is_none() && suite.usable_for_signature_algorithm(kind)
    };
    if tls.min_version == TlsVersion::Tls13 || tls.cipher_suites.is_empty() {
        return Ok(());
    }
    let mut chosen = all.iter().filter(|suite| is_chosen(suite) && suite.tls13().is_none());
    if chosen.clone().next().is_none() {
        warn!("Only cipher suites of TLS 1.3 are chosen, so TLS 1.2 is off; clients need TLS 1.3.");
        return Ok(());
    }
    if chosen.any(|suite| fit(&suite)) {
        return Ok(());
    }
    let fitting: Vec<u16> = all.iter().filter(fit).map(|suite| suite.suite().into()).collect();
    Err(format!(
        "the certificate's key is {kind:?}, and none of the chosen cipher suites of TLS 1.2 can be \
         used with it; choose among {}, or take a certificate with another key",
        CipherSuite::names(&fitting).join(" ")
    ))
}

/// A certificate for this host's names, with a new key (ECDSA, P-256).
fn self_signed() -> Result<CertifiedKey, String> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    // Linux' own name of the host; elsewhere the certificate goes without.
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if let Some(host) = Some(host.trim()).filter(|host| !host.is_empty() && host.is_ascii()) {
        names.push(host.to_owned());
    }
    make_certificate(names, SystemTime::now())
        .map_err(|error| format!("a certificate cannot be made: {error}"))
}

fn make_certificate(names: Vec<String>, now: SystemTime) -> Result<CertifiedKey, String> {
    let mut params = rcgen::CertificateParams::new(names).map_err(|e| e.to_string())?;
    let since_1970 = now.duration_since(UNIX_EPOCH).map_err(|e| e.to_string())?;
    let now = rcgen::date_time_ymd(1970, 1, 1) + since_1970;
    params.not_before = now - SELF_SIGNED_BEFORE;
    params.not_after = now + Duration::from_secs(SELF_SIGNED_DAYS * 24 * 3600);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "kvroute");
    params.distinguished_name.push(rcgen::DnType::CommonName, "localhost");
    let secret = rcgen::KeyPair::generate().map_err(|e| e.to_string())?;
    let certificate = params.self_signed(&secret).map_err(|e| e.to_string())?;
    let secret = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(secret.serialize_der()));
    CertifiedKey::from_der(vec![certificate.der().clone()], secret, &ring::default_provider())
        .map_err(|e| e.to_string())
}

/// What two files hold.
#[derive(Clone, PartialEq, Eq)]
struct Pair {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl Pair {
    fn read(files: &TlsFiles) -> Result<Pair, String> {
        Ok(Pair { cert: read_pem(&files.cert)?, key: read_pem(&files.key)? })
    }

    /// The certificate and its key; the error names the file that is wrong.
    fn certified(&self, files: &TlsFiles) -> Result<CertifiedKey, String> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&self.cert)
            .collect::<Result<_, _>>()
            .map_err(|e| wrong(&files.cert, &e))?;
        if chain.is_empty() {
            return Err(wrong(&files.cert, &"the file holds no certificate"));
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|e| wrong(&files.key, &e))?;
        CertifiedKey::from_der(chain, key, &ring::default_provider())
            .map_err(|e| format!("{} with {}: {e}", files.cert.display(), files.key.display()))
    }
}

fn wrong(path: &Path, error: &dyn fmt::Display) -> String {
    format!("{}: {error}", path.display())
}

fn read_pem(path: &Path) -> Result<Vec<u8>, String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        File::open(path)?.take(PEM_BYTES_MAX + 1).read_to_end(&mut content)?;
        Ok(content)
    };
    let content = read().map_err(|e| wrong(path, &e))?;
    if content.len() as u64 > PEM_BYTES_MAX {
        return Err(wrong(path, &format_args!("larger than {PEM_BYTES_MAX} bytes")));
    }
    Ok(content)
}

/// Files of which a listener has its certificate. Their content is compared, not their times: a
/// Kubernetes Secret changes by swapping a symlink.
pub(crate) struct WatchedFiles {
    files: TlsFiles,
    tls: ServerTls,
    /// What they held when the listener began.
    used: Pair,
    shown: Arc<Shown>,
}

impl WatchedFiles {
    /// Uses what the files hold whenever that has changed, for ever. A pair that cannot be used
    /// changes nothing, is reported once, and tried again when it changes.
    pub async fn watch(self: Arc<WatchedFiles>, reloads: Family<ResultLabel, Counter>) {
        let mut seen = Ok(self.used.clone());
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.read().await;
            if now == seen {
                continue;
            }
            let now = self.settle(now).await;
            if now == seen {
                continue;
            }
            let cert = self.files.cert.display();
            let result = match now.as_ref().map_err(Clone::clone).and_then(|p| self.take_up(p)) {
                Ok(()) => {
                    info!(%cert, "The certificate was read again.");
                    "ok"
                }
                Err(error) => {
                    warn!(%cert, error, "A changed certificate cannot be used; the old one stays.");
                    "failed"
                }
            };
            reloads.get_or_create(&ResultLabel { result }).inc();
            seen = now;
        }
    }

    async fn read(self: &Arc<WatchedFiles>) -> Result<Pair, String> {
        let files = Arc::clone(self);
        let read = tokio::task::spawn_blocking(move || Pair::read(&files.files));
        read.await.map_err(|e| e.to_string()).flatten()
    }

    /// Looks until two looks see the same.
    async fn settle(
        self: &Arc<WatchedFiles>,
        mut now: Result<Pair, String>,
    ) -> Result<Pair, String> {
        loop {
            tokio::time::sleep(QUIET).await;
            let again = self.read().await;
            if again == now {
                return now;
            }
            now = again;
        }
    }

    fn take_up(&self, pair: &Pair) -> Result<(), String> {
        let certified = pair.certified(&self.files)?;
        fits(&self.tls, &certified)?;
        self.shown.0.store(Arc::new(certified));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::client::WebPkiServerVerifier;
    use tokio_rustls::rustls::client::danger::ServerCertVerifier;
    use tokio_rustls::rustls::pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::{ClientConfig, ProtocolVersion, RootCertStore};

    use super::*;

    fn tls(min_version: TlsVersion, suites: &[&str]) -> ServerTls {
        let cipher_suites = suites.iter().map(|name| name.parse().unwrap()).collect();
        ServerTls {
            certificate: ServerCertificate::SelfSigned,
            min_version,
            cipher_suites,
            client_ca: None,
        }
    }

    fn roots(certificate: &CertificateDer<'static>) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        Arc::new(roots)
    }

    /// What a client that trusts the server's own certificate agrees with it: version, cipher
    /// suite, protocol.
    async fn agree(
        tls: &ServerTls,
        name: &'static str,
        versions: &[&'static SupportedProtocolVersion],
        alpn: &[&str],
    ) -> Result<(ProtocolVersion, u16, Vec<u8>), String> {
        let made = self_signed().unwrap();
        let certificate = made.cert[0].clone();
        let server = acceptor(tls, &["h2"], shown(made)).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots(&certificate))
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let client = TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from(name).unwrap();
        let (accepted, connected) = tokio::join!(server.accept(ours), client.connect(name, theirs));
        let accepted = accepted.map_err(|e| e.to_string())?;
        connected.map_err(|e| e.to_string())?;
        let (_, agreed) = accepted.get_ref();
        let suite = agreed.negotiated_cipher_suite().unwrap().suite();
        let protocol = agreed.alpn_protocol().unwrap_or_default().to_vec();
        Ok((agreed.protocol_version().unwrap(), suite.into(), protocol))
    }

    const TLS12: &[&SupportedProtocolVersion] = &[&version::TLS12];
    const TLS13: &[&SupportedProtocolVersion] = &[&version::TLS13];
    const ANY: &[&SupportedProtocolVersion] = &[&version::TLS13, &version::TLS12];

    #[tokio::test]
    async fn a_certificate_of_its_own_is_of_this_host() {
        let tls = tls(TlsVersion::Tls12, &[]);
        for name in ["localhost", "127.0.0.1", "::1"] {
            let (version, _, protocol) = agree(&tls, name, ANY, &["h2"]).await.unwrap();
            assert_eq!((version, &protocol[..]), (ProtocolVersion::TLSv1_3, &b"h2"[..]), "{name}");
        }
        let error = agree(&tls, "elsewhere", ANY, &["h2"]).await.unwrap_err();
        assert!(error.contains("BadCertificate"), "{error}");
    }

    #[tokio::test]
    async fn only_offered_protocols_are_agreed() {
        let tls = tls(TlsVersion::Tls12, &[]);
        let error = agree(&tls, "localhost", ANY, &["http/1.1"]).await.unwrap_err();
        assert!(error.contains("known protocol"), "{error}");
        let both = agree(&tls, "localhost", ANY, &["http/1.1", "h2"]).await.unwrap();
        assert_eq!(both.2, b"h2");
        // A client that names no protocol knows beforehand what is spoken.
        assert_eq!(agree(&tls, "localhost", ANY, &[]).await.unwrap().2, b"");
    }

    #[test]
    fn it_is_valid_for_ten_years() {
        const DAY: u64 = 24 * 3600;
        let provider = Arc::new(ring::default_provider());
        let certificate = self_signed().unwrap().cert[0].clone();
        let verifier = WebPkiServerVerifier::builder_with_provider(roots(&certificate), provider);
        let verifier = verifier.build().unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        for (at, valid) in [
            (now - DAY, false),
            (now - 1800, true),
            (now + 3649 * DAY, true),
            (now + 3651 * DAY, false),
        ] {
            let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
            let found = verifier.verify_server_cert(&certificate, &[], &name, &[], at);
            assert_eq!(found.is_ok(), valid, "{found:?}");
        }
    }

    #[tokio::test]
    async fn old_versions_are_refused() {
        for (min, client, spoken) in [
            (TlsVersion::Tls10, TLS12, true),
            (TlsVersion::Tls11, TLS12, true),
            (TlsVersion::Tls12, TLS12, true),
            (TlsVersion::Tls12, TLS13, true),
            (TlsVersion::Tls13, TLS12, false),
            (TlsVersion::Tls13, TLS13, true),
        ] {
            let agreed = agree(&tls(min, &[]), "localhost", client, &["h2"]).await;
            assert_eq!(agreed.is_ok(), spoken, "{min:?} {agreed:?}");
        }
    }

    #[tokio::test]
    async fn cipher_suites_are_chosen_for_tls_1_2_only() {
        const AES_256: &str = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384";
        let suite =
            |agreed: Result<(ProtocolVersion, u16, Vec<u8>), String>| agreed.ok().map(|a| a.1);
        let two = tls(TlsVersion::Tls12, &[AES_256, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]);
        assert_eq!(suite(agree(&two, "localhost", TLS12, &[]).await), Some(0xc02c));
        assert!(suite(agree(&two, "localhost", TLS13, &[]).await).is_some());
        // Suites of TLS 1.3 are none for TLS 1.2; those of another kind of key refuse the start.
        for name in ["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256"] {
            let other = tls(TlsVersion::Tls12, &[name]);
            assert_eq!(suite(agree(&other, "localhost", TLS12, &[]).await), None, "{name}");
            assert!(suite(agree(&other, "localhost", TLS13, &[]).await).is_some(), "{name}");
        }
    }

    /// A suite that no client could agree on with the certificate's key, which nobody would learn
    /// but the proxies that are cut off.
    #[tokio::test]
    async fn suites_that_do_not_fit_the_key_refuse_the_start() {
        const RSA: &str = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256";
        const ECDSA: &str = "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256";
        let table: [(TlsVersion, &[&str], bool); 7] = [
            (TlsVersion::Tls12, &[], true),
            (TlsVersion::Tls12, &[ECDSA], true),
            (TlsVersion::Tls12, &[RSA, ECDSA], true),
            (TlsVersion::Tls12, &["TLS_AES_128_GCM_SHA256"], true),
            (TlsVersion::Tls13, &[RSA], true),
            (TlsVersion::Tls12, &[RSA], false),
            (TlsVersion::Tls12, &[RSA, "TLS_AES_128_GCM_SHA256"], false),
        ];
        for (min, suites, starts) in table {
            let server = Server::new(&tls(min, suites), &["h2"]);
            assert_eq!(server.is_ok(), starts, "{min:?} {suites:?}");
            let error = server.err().unwrap_or_default();
            assert!(starts || (error.contains(ECDSA) && !error.contains(RSA)), "{error}");
            assert!(!error.contains("POLY1305 "), "one name for each: {error}");
        }
    }

    #[test]
    fn a_changed_certificate_must_fit_the_chosen_suites() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let pair = Pair {
            cert: made.cert.pem().into_bytes(),
            key: made.signing_key.serialize_pem().into_bytes(),
        };
        let watched = |suites: &[&str]| WatchedFiles {
            files: TlsFiles { cert: "c".into(), key: "k".into() },
            tls: tls(TlsVersion::Tls12, suites),
            used: pair.clone(),
            shown: shown(self_signed().unwrap()),
        };
        assert_eq!(watched(&[]).take_up(&pair), Ok(()));
        let rsa = watched(&["TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"]);
        assert!(rsa.take_up(&pair).unwrap_err().contains("_ECDSA_"));
    }
}
