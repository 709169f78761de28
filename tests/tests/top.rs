//! `tunroute top` on a terminal: tmux runs it, types into it, and reads the screen.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tunroute::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, TunnelKind, World, daemon::binary, pace::patience, ping, plan::REMOTE,
    traffic::Answer,
};

const SOON: Duration = Duration::from_secs(10);
/// What the shell says when `top` has ended, with its exit status.
const ENDED: &str = "ended with";

/// A terminal with a shell in a world's host. Dropping it ends both.
struct Terminal<'a> {
    world: &'a World,
    socket: PathBuf,
}

impl<'a> Terminal<'a> {
    fn open(world: &'a World, (columns, rows): (u16, u16)) -> Result<Self> {
        let terminal = Self { world, socket: world.dir().join("tmux") };
        let (columns, rows) = (columns.to_string(), rows.to_string());
        // A shell without settings, whose prompt is known.
        let shell = "env PS1='$ ' sh";
        terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", &columns, "-y", &rows, shell])?;
        Ok(terminal)
    }

    fn tmux(&self, args: &[&str]) -> Result<String> {
        self.world.host.run_in(|| {
            let mut tmux = Command::new("tmux");
            tmux.arg("-u").arg("-S").arg(&self.socket).args(args).env("LC_ALL", "C.UTF-8").env_remove("NO_COLOR");
            let output = tmux.output().context("cannot start tmux")?;
            ensure!(output.status.success(), "tmux {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8(output.stdout)?)
        })
    }

    /// Types a line into the shell.
    fn command(&self, line: &str) -> Result<()> {
        self.tmux(&["send-keys", "-l", line])?;
        self.tmux(&["send-keys", "Enter"]).map(drop)
    }

    /// Starts `top`; the shell tells how it ended.
    fn top(&self, variables: &str) -> Result<()> {
        let (binary, runtime) = (binary()?, self.world.host.dir().join("run"));
        let (binary, runtime) = (binary.display(), runtime.display());
        self.command(&format!("clear; {variables} {binary} top --runtime-dir {runtime}; echo {ENDED} $?"))
    }

    fn screen(&self) -> Result<String> {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits for a screen, and returns it.
    fn wait(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
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

    /// `top` has given the terminal back: the shell's own screen is there again, and takes what is typed and shows it.
    fn is_restored(&self, status: &str) -> Result<()> {
        let ended = format!("{ENDED} {status}");
        self.wait("the end", |screen| screen.contains(&ended) && !screen.contains("PACKETS/s"))?;
        self.command("stty -a | grep -o ' icanon\\| echo ' && echo a''b")?;
        let screen = self.wait("the shell", |screen| screen.contains("ab"))?;
        ensure!(screen.contains("\n icanon") && screen.contains("\n echo"), "{screen}");
        let cursor = self.tmux(&["display-message", "-p", "#{cursor_flag} #{alternate_on}"])?;
        assert_eq!(cursor.trim(), "1 0", "the cursor is shown, on the usual screen");
        Ok(())
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        // The test has failed already if it is gone.
        let _ = self.tmux(&["kill-server"]);
    }
}

/// The cells of the line that begins with this name.
fn cells<'s>(screen: &'s str, name: &str) -> Vec<&'s str> {
    let line = screen.lines().find(|line| line.split_whitespace().next() == Some(name));
    line.map(|line| line.split_whitespace().collect()).unwrap_or_default()
}

#[test]
fn top_shows_what_goes_through_and_what_happens() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let config = world.config().replacen(
        "[tunnel.sixxs1]\n",
        "[tunnel.sixxs1]\nprobe = { target = \"192.0.2.1\", interval = \"100ms\" }\n",
        1,
    );
    let _daemon = Daemon::start(&world, &config, &DaemonOptions::default())?;
    let terminal = Terminal::open(&world, (80, 24))?;
    terminal.top("")?;
    let first = terminal.wait("the view", |screen| screen.contains("PACKETS/s") && screen.contains("POLICY"))?;
    ensure!(first.starts_with("tunroute 0.1.0, pid "), "{first}");
    ensure!(first.lines().all(|line| line.chars().count() <= 80) && first.lines().count() <= 24, "{first}");

    // Packets: the client's echo requests go by the fast path, and their answers come by the tunnel.
    let client = TUNNELS[0].client.of(Family::V6);
    let rate = |screen: &str, name: &str, column: usize| -> u64 {
        cells(screen, name).get(column).and_then(|cell| cell.parse().ok()).unwrap_or(0)
    };
    let deadline = Instant::now() + patience(SOON);
    let busy = loop {
        assert_eq!(ping(&world.client, client, REMOTE.of(Family::V6))?, Answer::Reply);
        let screen = terminal.screen()?;
        // POLICY LEAVES-BY DECIDED-BY (two words) PACKETS/s; TUNNEL STATE PACKETS/s BYTES/s (two words) PACKETS/s.
        if rate(&screen, "tunnel0", 4) > 0 && rate(&screen, "sixxs0", 2) > 0 && rate(&screen, "sixxs0", 5) > 0 {
            break screen;
        }
        ensure!(Instant::now() < deadline, "no rate in\n{screen}");
    };
    assert_eq!(cells(&busy, "tunnel0")[1], "sixxs0", "{busy}");
    ensure!(busy.contains('█'), "no sparkline in\n{busy}");
    assert_eq!(rate(&busy, "tunnel1", 4), 0, "{busy}");

    // Events, and the health of the probe, whose target is not there.
    world.host.ip("link set sixxs0 down")?;
    terminal.wait("the tunnel's fall", |screen| screen.contains("tunnel sixxs0: up → down"))?;
    terminal.wait("the policy's move", |screen| screen.contains("tunnel0, IPv6, leaves by: sixxs0 → (unreachable)"))?;
    world.host.ip("link set sixxs0 up")?;
    terminal.wait("the tunnel's rise", |screen| screen.contains("tunnel sixxs0: down → up"))?;
    terminal.wait("the probe", |screen| screen.contains("192.0.2.1") && screen.contains("100.0 %"))?;
    world.host.sysctl(&[("ipv4/ip_forward", "0")])?;
    terminal.wait("the gate", |screen| screen.contains("closed: the kernel does not forward IPv4"))?;
    world.host.sysctl(&[("ipv4/ip_forward", "1")])?;
    terminal.wait("the open gate", |screen| screen.contains("opened: the kernel does not forward IPv4"))?;

    // Another size.
    terminal.tmux(&["resize-window", "-x", "120", "-y", "40"])?;
    let far_right = |screen: &str| screen.lines().any(|line| line.chars().count() == 120 && line.ends_with("BYTES/s"));
    terminal.wait("the larger view", far_right)?;
    terminal.tmux(&["resize-window", "-x", "60", "-y", "12"])?;
    terminal.wait("the smaller view", |screen| screen.contains("POLICY") && !screen.contains("EVENT"))?;
    terminal.tmux(&["send-keys", "q"])?;
    terminal.is_restored("0")
}

#[test]
fn the_terminal_is_given_back_however_top_ends() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let terminal = Terminal::open(&world, (80, 24))?;
    for keys in ["q", "Escape", "C-c"] {
        terminal.top("")?;
        terminal.wait("the view", |screen| screen.contains("PACKETS/s"))?;
        terminal.tmux(&["send-keys", keys])?;
        terminal.is_restored("0")?;
    }
    // Ended by a signal, with colours and without.
    for (variables, colours) in [("", true), ("NO_COLOR=1", false)] {
        terminal.top(variables)?;
        terminal.wait("the view", |screen| screen.contains("PACKETS/s"))?;
        let painted = terminal.tmux(&["capture-pane", "-p", "-e"])?;
        // Of 256 colours, number 2 is green.
        assert_eq!(painted.contains("\x1b[38;5;2mup"), colours, "{painted:?}");
        let pane = terminal.tmux(&["display-message", "-p", "#{pane_pid}"])?;
        let ended = Command::new("pkill").args(["-TERM", "-P", pane.trim(), "tunroute"]).status()?;
        ensure!(ended.success(), "no child of the shell {}", pane.trim());
        terminal.is_restored("0")?;
    }

    // The daemon goes and comes back: the view waits for it.
    terminal.top("")?;
    terminal.wait("the view", |screen| screen.contains("PACKETS/s"))?;
    drop(daemon);
    terminal.wait("the daemon's absence", |screen| screen.contains("no answer for"))?;
    let _daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    terminal.wait("the daemon's return", |screen| {
        screen.contains("the daemon answers again") && screen.contains("another daemon answers")
    })?;
    terminal.tmux(&["send-keys", "q"])?;
    terminal.is_restored("0")
}

#[test]
fn without_a_terminal_or_a_daemon_there_is_one_message() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let output = daemon.client(&["top"])?;
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    let said = String::from_utf8(output.stderr)?;
    ensure!(
        said.lines().count() == 1 && said.contains("needs a terminal") && said.contains("status --watch"),
        "{said}"
    );
    drop(daemon);

    let terminal = Terminal::open(&world, (80, 24))?;
    terminal.top("")?;
    let screen = terminal.wait("the end", |screen| screen.contains(&format!("{ENDED} 1")))?;
    ensure!(screen.contains("no tunroute daemon answers"), "{screen}");
    terminal.is_restored("1")
}
