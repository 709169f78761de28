//! `tunroute top` on a terminal: tmux runs it, types into it, and reads the screen.

use std::{process::Command, time::Instant};

use anyhow::{Result, ensure};
use tunroute::policy::net::Family;
use tunroute_tests::{
    Daemon, DaemonOptions, TUNNELS, Terminal, TunnelKind, World,
    pace::{SOON, patience},
    ping,
    plan::REMOTE,
    terminal::ENDED,
    traffic::Answer,
};

/// Starts `top`.
fn top(terminal: &Terminal<'_>, variables: &str) -> Result<()> {
    let runtime = terminal.world().host.dir().join("run");
    terminal.tunroute(variables, &format!("top --runtime-dir {}", runtime.display()))
}

/// `top` has given the terminal back: the shell's own screen is there again, and takes what is typed and shows it.
fn is_restored(terminal: &Terminal<'_>, status: &str) -> Result<()> {
    let ended = format!("{ENDED} {status}");
    terminal.wait("the end", |screen| screen.contains(&ended) && !screen.contains("PACKETS/s"))?;
    terminal.command("stty -a | grep -o ' icanon\\| echo ' && echo a''b")?;
    let screen = terminal.wait("the shell", |screen| screen.contains("ab"))?;
    ensure!(screen.contains("\n icanon") && screen.contains("\n echo"), "{screen}");
    let cursor = terminal.tmux(&["display-message", "-p", "#{cursor_flag} #{alternate_on}"])?;
    assert_eq!(cursor.trim(), "1 0", "the cursor is shown, on the usual screen");
    Ok(())
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
    top(&terminal, "")?;
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
    is_restored(&terminal, "0")
}

#[test]
fn the_terminal_is_given_back_however_top_ends() -> Result<()> {
    let world = World::with(TunnelKind::Tun).build()?;
    let daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    let terminal = Terminal::open(&world, (80, 24))?;
    for keys in ["q", "Escape", "C-c"] {
        top(&terminal, "")?;
        terminal.wait("the view", |screen| screen.contains("PACKETS/s"))?;
        terminal.tmux(&["send-keys", keys])?;
        is_restored(&terminal, "0")?;
    }
    // Ended by a signal, with colours and without.
    for (variables, colours) in [("", true), ("NO_COLOR=1", false)] {
        top(&terminal, variables)?;
        // The screen may be looked at while it is being painted.
        terminal.wait("the view", |screen| cells(screen, "sixxs1").get(1) == Some(&"up"))?;
        let painted = terminal.painted()?;
        // Of 256 colours, number 2 is green.
        assert_eq!(painted.contains("\x1b[38;5;2mup"), colours, "{painted:?}");
        let pane = terminal.tmux(&["display-message", "-p", "#{pane_pid}"])?;
        let ended = Command::new("pkill").args(["-TERM", "-P", pane.trim(), "tunroute"]).status()?;
        ensure!(ended.success(), "no child of the shell {}", pane.trim());
        is_restored(&terminal, "0")?;
    }

    // The daemon goes and comes back: the view waits for it.
    top(&terminal, "")?;
    terminal.wait("the view", |screen| screen.contains("PACKETS/s"))?;
    drop(daemon);
    terminal.wait("the daemon's absence", |screen| screen.contains("no answer for"))?;
    let _daemon = Daemon::start(&world, &world.config(), &DaemonOptions::default())?;
    terminal.wait("the daemon's return", |screen| {
        screen.contains("the daemon answers again") && screen.contains("the daemon has been restarted")
    })?;
    terminal.tmux(&["send-keys", "q"])?;
    is_restored(&terminal, "0")
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
    top(&terminal, "")?;
    let screen = terminal.wait("the end", |screen| screen.contains(&format!("{ENDED} 1")))?;
    ensure!(screen.contains("no tunroute daemon answers"), "{screen}");
    is_restored(&terminal, "1")
}
