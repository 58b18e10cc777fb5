//! How is a page fetched, again and again? Over a connection and into a buffer that stay.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kvroute_core::collect::{Ask, Scheme};

use crate::tls::Tls;
use crate::upstream::{Connection, Upstream, UpstreamError};

/// Share of a scrape's time that connecting may take: less than all, so that a host that cannot be
/// reached is told from one that is slow.
const CONNECT_SHARE: f64 = 0.9;

/// Longest wait for one step of an exchange. The exchange as a whole has a limit of its own, and
/// the connection's timer is not to wake the task in between.
const STEP_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Room for the head of an answer, and for a page that is a little longer than the last.
const HEAD_BYTES: usize = 4 << 10;
/// Room for a page at most; longer ones come in several reads.
const ROOM_BYTES_MAX: usize = 64 << 10;

/// Something to ask for, and what it needs of files.
#[derive(Debug)]
pub(super) struct Asked {
    pub ask: Ask,
    tls: Option<Tls>,
}

impl Asked {
    /// The error says which file cannot be used.
    pub fn new(ask: &Ask) -> Result<Asked, String> {
        let tls = match ask.scheme {
            Scheme::Http => None,
            Scheme::Https => {
                let made = Tls::new(&ask.tls);
                Some(made.map_err(|e| format!("`{}` cannot use TLS: {e}", ask.source))?)
            }
        };
        Ok(Asked { ask: ask.clone(), tls })
    }
}

/// Where a page of one endpoint is.
#[derive(Debug)]
pub(super) struct Place {
    address: SocketAddr,
    /// For the `host` header.
    authority: String,
    /// Whom its certificate must name.
    host: String,
    tls: Option<Tls>,
}

impl Place {
    /// Metrics may be somewhere else than the endpoint itself.
    pub fn of_metrics(asked: &Asked, upstream: &Upstream) -> Place {
        let whereabouts = &upstream.whereabouts;
        let Ask { port, at_node, .. } = &asked.ask;
        let own = upstream.address;
        match (port, &whereabouts.metrics) {
            (None, Some((host, address))) => Place::new(asked, host, *address),
            (None, None) => Place::of_endpoint(asked, upstream),
            (Some(port), _) => match whereabouts.node.filter(|_| *at_node) {
                Some(node) => Place::new(asked, "", SocketAddr::new(node, *port)),
                None => Place::new(asked, &whereabouts.host, SocketAddr::new(own.ip(), *port)),
            },
        }
    }

    /// At the endpoint's own address.
    pub fn of_endpoint(asked: &Asked, upstream: &Upstream) -> Place {
        Place::new(asked, &upstream.whereabouts.host, upstream.address)
    }

    fn new(asked: &Asked, host: &str, address: SocketAddr) -> Place {
        let is_name = !host.is_empty() && host.parse::<IpAddr>().is_err();
        let authority = match is_name && asked.tls.is_some() {
            true => format!("{host}:{}", address.port()),
            false => address.to_string(),
        };
        let host = if is_name { host.to_owned() } else { address.ip().to_string() };
        Place { address, authority, host, tls: asked.tls.clone() }
    }

    /// Whether one connection leads to both, asked for as these say.
    pub fn is_same(&self, other: &Place, asks: [&Ask; 2]) -> bool {
        let [a, b] = asks;
        self.address == other.address
            && self.authority == other.authority
            && a.scheme == b.scheme
            && (a.scheme == Scheme::Http || a.tls == b.tls)
    }
}

/// Fetches pages of one place.
#[derive(Debug)]
pub(super) struct Fetch {
    place: Place,
    connection: Option<Connection>,
    head: Vec<u8>,
    /// The page that came last.
    pub page: Vec<u8>,
}

impl Fetch {
    pub fn new(place: Place) -> Fetch {
        Fetch { place, connection: None, head: Vec::new(), page: Vec::new() }
    }

    /// Reads a page into `self.page`; the answer's status.
    pub async fn get(
        &mut self,
        path: &str,
        timeout: Duration,
        bytes_max: usize,
    ) -> Result<u16, UpstreamError> {
        let connection = self.connection.take();
        let reused = connection.is_some();
        let late = || Err(UpstreamError::FirstByteTimeout(timeout));
        let first = self.exchange(path, connection, timeout, bytes_max);
        match tokio::time::timeout(timeout, first).await.unwrap_or_else(|_| late()) {
            // The engine may have closed a connection that was idle.
            Err(UpstreamError::Closed | UpstreamError::Broken(_)) if reused => {
                let again = self.exchange(path, None, timeout, bytes_max);
                tokio::time::timeout(timeout, again).await.unwrap_or_else(|_| late())
            }
            other => other,
        }
    }

    async fn exchange(
        &mut self,
        path: &str,
        connection: Option<Connection>,
        timeout: Duration,
        bytes_max: usize,
    ) -> Result<u16, UpstreamError> {
        let place = &self.place;
        let mut connection = match (connection, &place.tls) {
            (Some(connection), _) => connection,
            (None, tls) => {
                let limit = timeout.mul_f64(CONNECT_SHARE);
                let plain = Connection::open(place.address, limit).await?;
                match tls {
                    Some(tls) => plain.encrypt(tls, &place.host).await?,
                    None => plain,
                }
            }
        };
        self.head.clear();
        for part in ["GET ", path, " HTTP/1.1\r\nhost: ", &place.authority, "\r\n\r\n"] {
            self.head.extend_from_slice(part.as_bytes());
        }
        let late = || UpstreamError::FirstByteTimeout(timeout);
        connection.send(&self.head, b"", STEP_MAX).await.ok_or_else(late)??;
        connection.expect_bytes((self.page.len() + HEAD_BYTES).min(ROOM_BYTES_MAX));
        let mut head = connection.read_head(false, STEP_MAX).await?;
        connection.read_body(&mut head.framing, &mut self.page, bytes_max).await?;
        if head.keep_alive {
            self.connection = Some(connection);
        }
        Ok(head.status.as_u16())
    }
}
