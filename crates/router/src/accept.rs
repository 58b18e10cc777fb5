//! Who may connect, and how? The accept loop of every listener that requests come through: a
//! bounded number of connections, patience with their first bytes, TLS where it is spoken.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvroute_core::settings::ms;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tracing::{debug, warn};

use crate::grpc::{self, Methods};
use crate::proxy;
use crate::shared::{Phase, Shared};
use crate::tls::Acceptor;

/// What is behind a listener.
#[derive(Clone)]
pub(crate) enum Door {
    /// The embedded proxy.
    Proxy,
    /// gRPC.
    Grpc(Methods),
}

impl Door {
    /// From when on nobody new comes in. A proxy that has not yet heard that this one stops goes
    /// on asking over ext_proc, and is answered as long as the drain lasts.
    fn is_closed(&self, phase: Phase) -> bool {
        match self {
            Door::Proxy => phase != Phase::Serving,
            Door::Grpc(_) => !matches!(phase, Phase::Serving | Phase::Draining),
        }
    }
}

/// Why a conversation ended early.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Accepts clients until the door closes, then waits for those that are left. Returns when the
/// last connection has ended.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    acceptor: Acceptor,
    door: Door,
    mut phase: watch::Receiver<Phase>,
) {
    let connections = Arc::new(Semaphore::new(shared.settings.connections_max as usize));
    // Every connection holds a sender: the channel ends with the last of them.
    let (alive, mut all_gone) = mpsc::channel::<()>(1);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &connections) => accepted,
            _ = phase.wait_for(|phase| door.is_closed(*phase)) => break,
        };
        let (stream, client, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: give connections time to end.
                warn!(%error, "A client's connection could not be accepted.");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (shared, acceptor, door) = (Arc::clone(&shared), acceptor.clone(), door.clone());
        let (phase, alive) = (phase.clone(), alive.clone());
        tokio::spawn(async move {
            shared.metrics.connections.inc();
            if let Err(error) = connection(&shared, stream, client, acceptor, &door, phase).await {
                proxy::count_unread(&shared, error.as_ref());
                debug!(%client, error = %error, "A client's connection broke.");
            }
            shared.metrics.connections.dec();
            drop((permit, alive));
        });
    }
    drop((listener, alive));
    let _ = all_gone.recv().await;
}

/// The next connection, once there is room for it. Those that must wait stay in the kernel's
/// backlog.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(room).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, client) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, client, permit))
}

async fn connection(
    shared: &Arc<Shared>,
    stream: TcpStream,
    client: SocketAddr,
    acceptor: Acceptor,
    door: &Door,
    phase: watch::Receiver<Phase>,
) -> Result<(), Failure> {
    let patience = ms(shared.settings.client_header_timeout_ms.max(1));
    // The protocol is told by the first bytes, and no timer of hyper's runs before them.
    let first = tokio::time::timeout(patience, stream.peek(&mut [0; 1])).await;
    match first {
        Ok(Ok(0)) | Err(_) => return Ok(()),
        Ok(read) => read?,
    };
    match acceptor {
        Acceptor::Plain => converse(shared, stream, client, door, phase).await,
        #[cfg(feature = "tls")]
        Acceptor::Tls(acceptor) => {
            let stream = acceptor.accept(stream, patience).await?;
            converse(shared, stream, client, door, phase).await
        }
    }
}

async fn converse<S>(
    shared: &Arc<Shared>,
    stream: S,
    client: SocketAddr,
    door: &Door,
    phase: watch::Receiver<Phase>,
) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match door {
        Door::Proxy => proxy::converse(shared, stream, client, phase).await,
        Door::Grpc(methods) => grpc::converse(shared, stream, methods, phase).await,
    }
}
