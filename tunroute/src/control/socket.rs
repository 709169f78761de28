//! The control socket: one request and one answer per connection, each a line of JSON.

use std::{
    fs, io,
    net::IpAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};
use tracing::{debug, warn};

use crate::{
    commands::explain::Explanation,
    commands::preview::Preview,
    commands::trace::{Traced, Wanted},
    commands::verify::Verification,
    control::status::Status,
};

/// The socket's name in the runtime directory.
pub const SOCKET: &str = "control.sock";
/// Maximum length of a request, in bytes.
pub const MAX_REQUEST: u64 = 64 << 10;
/// Maximum length of an answer, in bytes.
const MAX_ANSWER: u64 = 256 << 20;
/// The message when a daemon of another version gives an unexpected answer.
pub const OTHER_ANSWER: &str = "the daemon gave another answer than asked for; is it of another version?";
/// Maximum time to read a request or write an answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of clients that are served at once.
const MAX_CLIENTS: usize = 32;

/// A request to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The status.
    Status,
    /// The operations that a reload would make.
    Plan {
        /// With this configuration file in place of the daemon's.
        file: Option<PathBuf>,
    },
    /// Read the configuration again.
    Reload,
    /// Reload, and return to the earlier configuration unless [`Request::Confirm`] follows in time.
    Apply {
        /// Length of the trial.
        seconds: TrialTime,
    },
    /// Keep the configuration on trial.
    Confirm,
    /// Start a tunnel's command again after it was given up.
    Start {
        /// The tunnel's name.
        tunnel: String,
    },
    /// The way of a packet.
    Explain {
        /// The source address.
        source: IpAddr,
        /// The destination address.
        destination: IpAddr,
        /// The device that it enters by; by default the first ingress device.
        iif: Option<String>,
    },
    /// Compare the datapaths.
    Verify {
        /// Number of random addresses of each prefix.
        samples: u32,
    },
    /// The decisions since the last such request. Recording stops when no more requests come.
    Trace {
        /// The client's session: any number, the same in each request.
        session: u64,
        /// The filter.
        wanted: Wanted,
    },
    /// Remove everything and stop.
    Down,
}

/// How long a configuration is on trial: from a second to a day, written in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct TrialTime(u64);

impl TryFrom<u64> for TrialTime {
    type Error = &'static str;

    fn try_from(seconds: u64) -> Result<Self, Self::Error> {
        if (1..=24 * 60 * 60).contains(&seconds) { Ok(Self(seconds)) } else { Err("from 1s to 24h") }
    }
}

impl From<TrialTime> for u64 {
    fn from(TrialTime(seconds): TrialTime) -> Self {
        seconds
    }
}

impl From<TrialTime> for Duration {
    fn from(TrialTime(seconds): TrialTime) -> Self {
        Self::from_secs(seconds)
    }
}

/// An answer of the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", content = "content", rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Plan`].
    Plan(Preview),
    /// To [`Request::Explain`].
    Explanation(Box<Explanation>),
    /// To [`Request::Verify`].
    Verified(Box<Verification>),
    /// To [`Request::Trace`].
    Traced(Traced),
    /// The request failed, for this reason.
    Failed(String),
}

/// A request with the channel for its answer.
pub type Call = (Request, oneshot::Sender<Answer>);

/// An error of the control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The daemon cannot listen.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// No daemon listens.
    #[error("no tunroute daemon answers at {}; is it running? (`tunroute run`, and --runtime-dir if it has its own)", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
    },
    /// The caller may not use the socket.
    #[error("only root and the daemon's own user may ask the daemon at {}: run this as root", path.display())]
    Forbidden {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be used.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The connection broke, or something else answered.
    #[error("the daemon at {} did not answer", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The channel from clients to the daemon.
#[must_use]
pub fn channel() -> (mpsc::Sender<Call>, mpsc::Receiver<Call>) {
    mpsc::channel(MAX_CLIENTS)
}

/// Listens in the runtime directory and passes on requests of root and of the daemon's own user.
///
/// # Errors
///
/// If the socket cannot be made. A socket that a dead daemon has left is replaced: the state directory's lock has shown
/// by then that there is no living one.
pub fn listen(runtime_dir: &Path, calls: mpsc::Sender<Call>) -> Result<(), ControlError> {
    let path = runtime_dir.join(SOCKET);
    let error = |source| ControlError::Listen { path: path.clone(), source };
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error(source)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(error)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(error)?;
    tokio::spawn(accept(listener, calls));
    Ok(())
}

async fn accept(listener: UnixListener, calls: mpsc::Sender<Call>) {
    let own = nix::unistd::geteuid().as_raw();
    let clients = std::sync::Arc::new(tokio::sync::Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = std::sync::Arc::clone(&clients).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Most likely out of descriptors, until one is closed.
                warn!("cannot accept a control connection: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 || peer.uid() == own => {
                let calls = calls.clone();
                tokio::spawn(async move {
                    let (reader, writer) = stream.into_split();
                    if let Err(error) = serve(reader, writer, calls).await {
                        debug!("control connection: {error}");
                    }
                    drop(permit);
                });
            }
            Ok(peer) => warn!("refused a control connection of user {}", peer.uid()),
            Err(error) => warn!("refused a control connection: {error}"),
        }
    }
}

/// Reads one request, passes it on, and writes the answer.
///
/// # Errors
///
/// If the client is gone, or too slow.
pub async fn serve(
    reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    calls: mpsc::Sender<Call>,
) -> io::Result<()> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader.take(MAX_REQUEST));
    tokio::time::timeout(REQUEST_TIMEOUT, reader.read_until(b'\n', &mut line)).await??;
    let answer = match serde_json::from_slice(&line) {
        Ok(request) => {
            let (answer, receiver) = oneshot::channel();
            // The daemon is stopping if it does not take or answer the call.
            let stopping = || Answer::Failed("the daemon is stopping".to_owned());
            match calls.send((request, answer)).await {
                Ok(()) => receiver.await.unwrap_or_else(|_| stopping()),
                Err(_) => stopping(),
            }
        }
        Err(error) => Answer::Failed(format!("not a request: {error}")),
    };
    let mut answer = serde_json::to_vec(&answer)?;
    answer.push(b'\n');
    tokio::time::timeout(REQUEST_TIMEOUT, writer.write_all(&answer)).await?
}

/// Asks the daemon that listens in the runtime directory.
///
/// # Errors
///
/// If there is none, or it does not answer.
pub async fn ask(runtime_dir: &Path, request: Request) -> Result<Answer, ControlError> {
    let path = runtime_dir.join(SOCKET);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Err(ControlError::NoDaemon { path });
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(ControlError::Forbidden { path }),
        Err(source) => return Err(ControlError::Connect { path, source }),
    };
    exchange(stream, request).await.map_err(|source| ControlError::Broken { path, source })
}

async fn exchange(stream: UnixStream, request: Request) -> io::Result<Answer> {
    let (reader, mut writer) = stream.into_split();
    let mut request = serde_json::to_vec(&request)?;
    request.push(b'\n');
    writer.write_all(&request).await?;
    let mut line = Vec::new();
    BufReader::new(reader.take(MAX_ANSWER)).read_until(b'\n', &mut line).await?;
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_of_any_other_length_is_no_request() {
        let read = |seconds: &str| {
            serde_json::from_str::<Request>(&format!("{{\"command\":\"apply\",\"seconds\":{seconds}}}"))
        };
        for seconds in ["1", "60", "86400"] {
            assert!(read(seconds).is_ok(), "{seconds}");
        }
        for seconds in ["0", "86401", "18446744073709551615", "-1", "1e30"] {
            assert!(read(seconds).is_err(), "{seconds}");
        }
    }
}
