//! A tunnel's commands as processes: run without a shell, in a process group of their own, their output in the log.
//!
//! A foreground `up` command outlives the daemon. For that its output is a pipe that it holds open for reading as well
//! as for writing: when the daemon dies, writing to it is no error and raises no SIGPIPE. The pipe is as large as the
//! kernel allows; when it is full the command waits, as it would for a stopped journald, until the next daemon finds
//! the pipe under `/proc/PID/fd` and reads on.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    process::Stdio,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, killpg},
    unistd::{Pid, pipe2},
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::unix::pipe,
    process::{Child, Command},
    time::{Instant, sleep},
};

use crate::host::service;

/// The size asked for the output pipe, in bytes: the default limit of `/proc/sys/fs/pipe-max-size`.
const PIPE_SIZE: i32 = 1 << 20;
/// The longest line that is logged, in bytes; the rest of a longer one is left out.
const MAX_LINE: usize = 1024;
/// How often a process that is not our child is looked at, and one that is to end.
const GLANCE: Duration = Duration::from_millis(100);
/// How long a process may take to end after SIGTERM, before SIGKILL.
pub const TERM_TIME: Duration = Duration::from_secs(5);

/// A process, so named that its number cannot be mistaken for a later process of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The process number, which is also the number of its process group.
    pub pid: i32,
    /// When it was started, in clock ticks since the machine was booted (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
    /// The inode of the pipe that takes its output.
    pub output: u64,
}

/// What `/proc/PID/stat` says of a process: its state and its start.
fn stat(pid: i32) -> Option<(char, u64)> {
    // `42 (a name) with (parentheses) S 1 42 …`: the fields are counted from the last parenthesis.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

impl ProcessId {
    /// Does it run? A zombie does not.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.pid > 1
            && stat(self.pid).is_some_and(|(state, ticks)| ticks == self.start_ticks && !matches!(state, 'Z' | 'X'))
    }

    /// Sends a signal to its group. A leader that is gone for good leaves no group that could be told from a stranger's.
    fn signal_group(&self, signal: Signal) {
        if self.pid > 1 && stat(self.pid).is_some_and(|(_, ticks)| ticks == self.start_ticks) {
            // It fails only if no process is left to signal.
            let _ = killpg(Pid::from_raw(self.pid), signal);
        }
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        while self.runs() {
            sleep(GLANCE).await;
        }
    }

    /// Ends its group: SIGTERM, and SIGKILL for what is left of it. The process must not be waited for before.
    pub async fn terminate(&self) {
        self.signal_group(Signal::SIGTERM);
        // A stopped process takes no other signal.
        self.signal_group(Signal::SIGCONT);
        let deadline = Instant::now() + TERM_TIME;
        while self.runs() && Instant::now() < deadline {
            sleep(GLANCE).await;
        }
        self.signal_group(Signal::SIGKILL);
    }

    /// The output of a process that an earlier daemon started; none if it writes elsewhere by now.
    #[must_use]
    pub fn output(&self) -> Option<pipe::Receiver> {
        [1, 2].into_iter().find_map(|fd| {
            let path = format!("/proc/{}/fd/{fd}", self.pid);
            let there = std::fs::metadata(&path).ok()?;
            if !there.file_type().is_fifo() || there.ino() != self.output {
                return None;
            }
            let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).ok()?;
            pipe::Receiver::from_file(file).ok()
        })
    }
}

/// Runs a command; its standard output and error come out of the pipe.
///
/// # Errors
/// It cannot be run: it does not exist, may not be executed, or the system is out of something.
pub fn spawn(argv: &[String]) -> io::Result<(Child, ProcessId, pipe::Receiver)> {
    let Some((program, arguments)) = argv.split_first() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the command is empty"));
    };
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    // Opening a pipe anew through /proc is the way to get one file that both reads and writes it.
    let theirs = both_ways(&theirs)?;
    // Smaller is fine, too.
    let _ = fcntl(&theirs, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
    let output = theirs.metadata()?.ino();
    let mut command = Command::new(program);
    // A tunnel's program that knows sd_notify(3) would speak for tunroute.
    for variable in service::VARIABLES {
        command.env_remove(variable);
    }
    let child = command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(theirs.try_clone()?)
        .stderr(theirs)
        .process_group(0)
        .spawn()?;
    // Not waited for yet, so it is still there, be it as a zombie.
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
    let start_ticks = stat(pid).map_or(0, |(_, ticks)| ticks);
    Ok((child, ProcessId { pid, start_ticks, output }, pipe::Receiver::from_owned_fd(ours)?))
}

/// The same pipe, open for reading and writing.
fn both_ways(pipe: &OwnedFd) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd());
    OpenOptions::new().read(true).write(true).open(path)
}

/// Logs the output of a pipe, line by line, until all writers are gone.
pub async fn log_output(tunnel: String, output: pipe::Receiver) {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    loop {
        if output.readable().await.is_err() {
            break;
        }
        match output.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => lines.push(buffer.get(..length).unwrap_or_default(), |line| {
                tracing::info!(tunnel, "{line}");
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => break,
        }
    }
    lines.push(b"\n", |line| tracing::info!(tunnel, "{line}"));
}

/// Cuts bytes into printable lines of bounded length. Empty ones are left out.
#[derive(Default)]
struct Lines {
    line: Vec<u8>,
    cut: bool,
}

impl Lines {
    fn push(&mut self, bytes: &[u8], mut emit: impl FnMut(&str)) {
        for &byte in bytes {
            match byte {
                b'\n' | b'\r' => {
                    if !self.line.is_empty() {
                        emit(&printable(&self.line, self.cut));
                    }
                    self.line.clear();
                    self.cut = false;
                }
                _ if self.line.len() < MAX_LINE => self.line.push(byte),
                _ => self.cut = true,
            }
        }
    }
}

/// Text that a terminal shows and does not obey.
fn printable(line: &[u8], cut: bool) -> String {
    let mut text = String::with_capacity(line.len());
    for char in String::from_utf8_lossy(line).chars() {
        match char {
            '\t' => text.push(' '),
            _ if char.is_control() => text.extend(char.escape_default()),
            _ => text.push(char),
        }
    }
    if cut {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let mut found = Vec::new();
        let mut lines = Lines::default();
        for chunk in chunks {
            lines.push(chunk, |line| found.push(line.to_owned()));
        }
        lines.push(b"\n", |line| found.push(line.to_owned()));
        found
    }

    #[test]
    fn output_becomes_lines() {
        assert_eq!(lines(&[b"one\ntw", b"o\r\n\n", b"three"]), ["one", "two", "three"]);
        assert_eq!(lines(&[b"\x1b[31mred\t\0\n", b"\xff\n"]), ["\\u{1b}[31mred \\u{0}", "\u{fffd}"]);
        let long = [b'x'; MAX_LINE + 1];
        assert_eq!(lines(&[&long, b"y\nz"]), [format!("{}…", "x".repeat(MAX_LINE)), "z".to_owned()]);
        assert_eq!(lines(&[&long[..MAX_LINE], b"\n"]), ["x".repeat(MAX_LINE)]);
    }

    proptest! {
        #[test]
        fn lines_are_bounded_and_printable(bytes in prop::collection::vec(any::<u8>(), 0..5000), cut in 0..5000usize) {
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            let found = lines(&[head, tail]);
            prop_assert_eq!(&found, &lines(&[&bytes]), "however it is cut");
            for line in found {
                // An escape takes up to 6 characters for one byte.
                prop_assert!(line.chars().count() <= 6 * MAX_LINE + 1);
                prop_assert!(!line.chars().any(char::is_control), "{:?}", line);
            }
        }
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let (_, start_ticks) = stat(pid).unwrap();
        let me = ProcessId { pid, start_ticks, output: 0 };
        assert!(me.runs());
        assert!(!ProcessId { start_ticks: start_ticks + 1, ..me }.runs());
        for pid in [i32::MIN, -1, 0, i32::MAX] {
            assert!(!ProcessId { pid, ..me }.runs(), "{pid}");
        }
    }
}
