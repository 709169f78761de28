//! A terminal, as a person has one: tmux runs a shell in it, types, and reads the screen.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    daemon::binary,
    pace::{SOON, patience},
    world::World,
};

/// What the shell says when a command has ended, with its exit status.
pub const ENDED: &str = "ended with";

/// A terminal with a shell in a world's host. Dropping it ends both.
#[derive(Debug)]
pub struct Terminal<'a> {
    world: &'a World,
    socket: PathBuf,
}

impl<'a> Terminal<'a> {
    /// Opens a terminal of this many columns and rows.
    ///
    /// # Errors
    /// tmux is not installed.
    pub fn open(world: &'a World, (columns, rows): (u16, u16)) -> Result<Self> {
        let terminal = Self { world, socket: world.dir().join("tmux") };
        let (columns, rows) = (columns.to_string(), rows.to_string());
        // A shell without settings, whose prompt is known.
        let shell = "env PS1='$ ' sh";
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", &columns, "-y", &rows, shell])?;
        Ok(terminal)
    }

    /// Where its shell is.
    #[must_use]
    pub const fn world(&self) -> &World {
        self.world
    }

    /// Tells tmux something; what it prints.
    ///
    /// # Errors
    /// It does not do that.
    pub fn tmux(&self, args: &[&str]) -> Result<String> {
        self.world.host.run_in(|| {
            let mut tmux = Command::new("tmux");
            tmux.arg("-u").arg("-S").arg(&self.socket).args(args).env("LC_ALL", "C.UTF-8").env_remove("NO_COLOR");
            let output = tmux.output().context("cannot start tmux")?;
            ensure!(output.status.success(), "tmux {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        })
    }

    /// Types a line into the shell.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn command(&self, line: &str) -> Result<()> {
        self.tmux(&["send-keys", "-l", line])?;
        self.tmux(&["send-keys", "Enter"]).map(drop)
    }

    /// Runs the binary under test with these variables, on an empty screen; the shell tells how it has [`ENDED`].
    ///
    /// # Errors
    /// It was not built, or the terminal is gone.
    pub fn tunroute(&self, variables: &str, args: &str) -> Result<()> {
        let binary = binary()?;
        // The words that tell of the end must not be seen before: not of an earlier command, and not in what is typed.
        self.tmux(&["send-keys", "-R"])?;
        let (first, last) = ENDED.split_at(1);
        self.command(&format!("{variables} {} {args}; echo {first}''{last} $?", binary.display()))
    }

    /// What is on the screen.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p"])
    }

    /// What is on the screen, with the codes for colours.
    ///
    /// # Errors
    /// The terminal is gone.
    pub fn painted(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p", "-e"])
    }

    /// Waits for a screen, and returns it.
    ///
    /// # Errors
    /// It does not come; the error has the last one.
    pub fn wait(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + patience(SOON);
        loop {
            let screen = self.screen()?;
            if wanted(&screen) {
                return Ok(screen);
            }
            ensure!(Instant::now() < deadline, "{what}: not seen in {SOON:?}; the screen is\n{screen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        // The test has failed already if it is gone.
        let _ = self.tmux(&["kill-server"]);
    }
}
