//! The control socket: one request and one answer a connection, each a line of JSON.

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
/// A request is a word or two: this many bytes are read of it.
pub const MAX_REQUEST: u64 = 64 << 10;
/// An answer may list many tunnels.
const MAX_ANSWER: u64 = 256 << 20;
/// What an older or newer daemon may do.
pub const OTHER_ANSWER: &str = "the daemon gave another answer than asked for; is it of another version?";
/// How long a client may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How many clients may be served at once.
const MAX_CLIENTS: usize = 32;

/// What may be asked of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How are things?
    Status,
    /// What would a reload change?
    Plan {
        /// With this configuration file in place of the daemon's.
        file: Option<PathBuf>,
    },
    /// Read the configuration again.
    Reload,
    /// Read the configuration again, and go back to the earlier one unless [`Request::Confirm`] follows in time.
    Apply {
        /// How long the trial lasts.
        seconds: TrialTime,
    },
    /// The configuration on trial is good.
    Confirm,
    /// Start a tunnel's command again after it was given up.
    Start {
        /// The tunnel's name.
        tunnel: String,
    },
    /// What becomes of a packet?
    Explain {
        /// Where it comes from.
        source: IpAddr,
        /// Where it goes to.
        destination: IpAddr,
        /// The device that it enters by; a sensible one unless told.
        iif: Option<String>,
    },
    /// Compare the datapaths.
    Verify {
        /// Random addresses of each prefix.
        samples: u32,
    },
    /// What was decided since this was asked last? Decisions are told as long as it is asked again and again.
    Trace {
        /// Who asks: any number, the same every time.
        session: u64,
        /// Of which decisions.
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

/// What the daemon answers.
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
    /// It could not be done, and why.
    Failed(String),
}

/// A request with the way back.
pub type Call = (Request, oneshot::Sender<Answer>);

/// What went wrong with the control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The daemon cannot listen.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody listens.
    #[error("no tunroute daemon answers at {}; is it running? (`tunroute run`, and --runtime-dir if it has its own)", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
    },
    /// The socket is not the caller's to use.
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
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke, or something else answered.
    #[error("the daemon at {} did not answer", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The way from those who ask to the daemon.
#[must_use]
pub fn channel() -> (mpsc::Sender<Call>, mpsc::Receiver<Call>) {
    mpsc::channel(MAX_CLIENTS)
}

/// Listens in the runtime directory and passes on what is asked by root or by the daemon's own user.
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
                // Out of descriptors, most likely: somebody will close one.
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
            // The daemon is on its way out if it does not take or answer the call.
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
