//! Notifications to the service manager (sd_notify(3)); none without one.
//!
//! The socket never blocks: a service manager that hangs must not keep the daemon from moving traffic off a dead tunnel.
//! A message that found no room is sent again.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::{Duration, Instant},
};

use nix::time::{ClockId, clock_gettime};
use tracing::warn;

/// What the service manager says to a service by its environment, and not to the service's own children.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// The way to the service manager.
#[derive(Debug)]
pub struct Service {
    socket: Option<UnixDatagram>,
    /// There was no room to say that the daemon is ready.
    owes_ready: bool,
    /// The status line as last sent.
    status: String,
    /// How often to say that the daemon is alive, and when that was last said.
    watchdog: Option<(Duration, Option<Instant>)>,
}

impl Service {
    /// Reads the environment. A socket that cannot be used is logged once.
    #[must_use]
    pub fn detect() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|path| {
            connect(&path).inspect_err(|error| warn!("cannot tell the service manager anything: {error}")).ok()
        });
        Self {
            socket,
            owes_ready: false,
            status: String::new(),
            watchdog: watchdog().map(|timeout| (timeout / 3, None)),
        }
    }

    /// The datapaths are in place; also the end of a reload.
    pub fn ready(&mut self) {
        self.owes_ready = !self.tell("READY=1");
    }

    /// A reload begins. What is told next is [`Self::ready`], whether the new configuration was taken or not.
    pub fn reloading(&self) {
        // With `Type=notify-reload` the time tells which reload this is.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        let _told = self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()));
    }

    /// The daemon is about to end.
    pub fn stopping(&self) {
        let _told = self.tell("STOPPING=1");
    }

    /// The line that `systemctl status` shows. Cheap if it has not changed.
    pub fn status(&mut self, line: String) {
        if line != self.status && self.tell(&format!("STATUS={}", line.replace('\n', " "))) {
            self.status = line;
        }
    }

    /// The daemon's main loop is alive. Call it at least every second.
    pub fn alive(&mut self) {
        if self.owes_ready {
            self.ready();
        }
        let now = Instant::now();
        if let Some((pause, last)) = self.watchdog
            && last.is_none_or(|last| now.duration_since(last) >= pause)
            && self.tell("WATCHDOG=1")
        {
            self.watchdog = Some((pause, Some(now)));
        }
    }

    fn tell(&self, message: &str) -> bool {
        self.socket.as_ref().is_none_or(|socket| socket.send(message.as_bytes()).is_ok())
    }
}

/// A path, or with `@` before it a name in the abstract namespace.
fn connect(path: &OsStr) -> io::Result<UnixDatagram> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// The time within which the service manager wants to hear that this process is alive.
fn watchdog() -> Option<Duration> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|_| meant).map(Duration::from_micros)
}
