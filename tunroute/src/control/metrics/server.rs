//! The metrics endpoint: HTTP on a TCP or Unix socket.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ACCEPT, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
};
use tracing::{debug, info, warn};

use super::{Format, Instruments, encode};
use crate::{
    config::Listen,
    control::socket::{Answer, Call},
};

/// Maximum number of readers that are served at once; others wait.
const MAX_READERS: usize = 4;
/// Maximum time to read a request, and maximum length of a connection.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum length of a request, in bytes.
const MAX_REQUEST: usize = 16 << 10;
/// Pause after a failure to accept, most likely for lack of descriptors.
const PAUSE: Duration = Duration::from_secs(1);

/// A running endpoint. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    listen: Listen,
    task: JoinHandle<()>,
    #[expect(dead_code, reason = "held to be removed with the server")]
    file: Option<SocketFile>,
}

/// A socket's file, which is removed with this value unless another one has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _gone_already = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Listens, and answers each scrape with the daemon's status at that moment, which is asked for through `calls`.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn start(listen: Listen, calls: mpsc::Sender<Call>, instruments: Instruments) -> io::Result<Self> {
        let (listener, file) = match &listen {
            Listen::Tcp(address) => (Listener::Tcp(TcpListener::bind(address).await?), None),
            Listen::Unix(path) => {
                let listener = bind_unix(path).await?;
                (Listener::Unix(listener), Some(SocketFile::new(path)?))
            }
        };
        info!("metrics at {listen}");
        let task = tokio::spawn(accept(listener, calls, instruments));
        Ok(Self { listen, task, file })
    }

    /// The address that it listens at.
    #[must_use]
    pub const fn listens_at(&self) -> &Listen {
        &self.listen
    }
}

/// Binds a socket for root and the daemon's user. One that nobody listens at, as a dead daemon leaves it, is replaced; one
/// that is in use, and any other file, is not.
async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let dead = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if fs::symlink_metadata(path).is_ok_and(|there| there.file_type().is_socket())
        && UnixStream::connect(path).await.is_err_and(dead)
    {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn accept(listener: Listener, calls: mpsc::Sender<Call>, instruments: Instruments) {
    let readers = Arc::new(Semaphore::new(MAX_READERS));
    loop {
        let Ok(permit) = Arc::clone(&readers).acquire_owned().await else { return };
        let stream: io::Result<Box<dyn Stream>> = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Box::new(stream) as _),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Box::new(stream) as _),
        };
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                warn!("cannot accept a reader of the metrics: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let (calls, instruments) = (calls.clone(), instruments.clone());
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, &calls, &instruments));
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(TIMEOUT).max_buf_size(MAX_REQUEST).keep_alive(false);
            match tokio::time::timeout(TIMEOUT, http.serve_connection(TokioIo::new(stream), service)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!("a reader of the metrics: {error}"),
                Err(_) => debug!("a reader of the metrics took more than {TIMEOUT:?}"),
            }
            drop(permit);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    calls: &mpsc::Sender<Call>,
    instruments: &Instruments,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
    let format = Format::accepted(accept);
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match scrape(calls, instruments).await {
            Some(text) => (StatusCode::OK, format.content_type(), format.write(&text).into_owned()),
            None => (StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the daemon is stopping\n".to_owned()),
        },
        (&Method::GET, _) => (StatusCode::NOT_FOUND, "text/plain", "the metrics are at /metrics\n".to_owned()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "metrics are only read\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    Ok(response)
}

async fn scrape(calls: &mpsc::Sender<Call>, instruments: &Instruments) -> Option<String> {
    let (answer, answered) = oneshot::channel();
    calls.send((crate::control::socket::Request::Status, answer)).await.ok()?;
    match answered.await.ok()? {
        Answer::Status(status) => encode(&status, instruments).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net;

    use super::*;

    #[tokio::test]
    async fn only_a_socket_that_nobody_listens_at_is_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("metrics.sock");
        let taken = async || bind_unix(&path).await.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse);

        let other = net::UnixListener::bind(&path).expect("a socket");
        assert!(taken().await, "in use");
        // With a full backlog nobody is let in, which is no refusal.
        other.set_nonblocking(true).expect("set");
        let waiting: Vec<_> = (0..200).map_while(|_| connect_at_once(&path)).collect();
        assert!(taken().await, "in use, with {} clients waiting", waiting.len());
        drop((other, waiting));

        drop(bind_unix(&path).await.expect("a dead socket is replaced"));
        fs::remove_file(&path).expect("there is one");
        let datagrams = net::UnixDatagram::bind(&path).expect("a socket");
        assert!(taken().await, "in use, of another type");
        drop(datagrams);
        fs::remove_file(&path).expect("there is one");
        fs::write(&path, "precious").expect("written");
        assert!(taken().await, "a file");
        assert_eq!(fs::read(&path).expect("still there"), b"precious");
    }

    /// A connection that need not wait to be accepted.
    fn connect_at_once(path: &Path) -> Option<UnixStream> {
        let connecting = std::pin::pin!(UnixStream::connect(path));
        match connecting.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
            std::task::Poll::Ready(Ok(stream)) => Some(stream),
            _ => None,
        }
    }

    #[test]
    fn a_socket_that_has_taken_the_place_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("metrics.sock");
        let bind = || drop(net::UnixListener::bind(&path).expect("a socket"));
        bind();
        let own = SocketFile::new(&path).expect("there is one");
        // The old one keeps its inode as long as it has a name.
        fs::rename(&path, directory.path().join("old")).expect("renamed");
        bind();
        drop(own);
        assert!(path.exists());
        drop(SocketFile::new(&path).expect("there is one"));
        assert!(!path.exists());
    }
}
