//! The scene in which a tunnel goes down and comes back while packets flow.

use std::{
    net::IpAddr,
    thread::sleep,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use tunroute_tests::{Capture, Flow, FlowOptions, Netns, TUNNELS, Watch, World};

use crate::{
    journey::{FAR, Journey, follow},
    scenes::{CLIENTS, OURS},
    stage::Stage,
};

/// Packets per second of each flow.
const RATE: u32 = 500;
/// How long the tunnel is up before, down, and up again.
const ACT: Duration = Duration::from_millis(400);
/// A tunnel that is back carries packets within a tenth of a second; on a busy machine, within this.
const PATIENCE: Duration = Duration::from_secs(10);

/// Packets to the remote host that belong to a tunnel.
struct Stream {
    label: String,
    tunnel: usize,
    flow: Flow,
}

impl Stream {
    fn start(world: &World, from: &Netns, src: IpAddr, tunnel: usize) -> Result<Self> {
        let far_end = Watch::entering(&world.remote, TUNNELS[tunnel].remote_device);
        let watch = [("far end", far_end), ("net0", Watch::leaving(&world.host, "net0"))];
        let flow = Flow::start(FlowOptions {
            from,
            src,
            to: &world.remote,
            dst: FAR,
            rate: RATE,
            payload: 32,
            watch: &watch,
        })?;
        Ok(Self { label: format!("{} {src}", from.label()), tunnel, flow })
    }
}

/// Plays the scene; a daemon runs in the world's host.
pub fn scene(stage: &mut Stage, world: &World) -> Result<()> {
    stage.scene(
        "A tunnel goes down and comes back",
        "The host and the client send 500 packets a second through each tunnel, while\n\
         sixxs0 is set down for a while. None of them may leave by net0 instead.",
    );
    let mut isp = Capture::on(&world.isp, "net0")?;
    let mut streams = Vec::new();
    for tunnel in [0, 1] {
        streams.push(Stream::start(world, &world.host, OURS[tunnel], tunnel)?);
        streams.push(Stream::start(world, &world.client, CLIENTS[tunnel], tunnel)?);
    }
    sleep(ACT);

    world.set_tunnel(0, false)?;
    stage.columns("sixxs0 is down: ping", Journey::COLUMNS);
    let expected = Journey::refused();
    let seen = follow(world, &world.client, CLIENTS[0], FAR, &expected)?;
    stage.expect(&format!("from {}", CLIENTS[0]), &expected, &seen);
    sleep(ACT);

    let back = SystemTime::now();
    world.set_tunnel(0, true)?;
    stage.columns("sixxs0 is up again", "first packet at the far end");
    for stream in streams.iter().filter(|stream| stream.tunnel == 0) {
        let arrival = stream.flow.wait_for("far end", back, PATIENCE);
        let after = arrival.and_then(|arrival| Ok(arrival.at.duration_since(back)?));
        let seen = match &after {
            Ok(after) => format!("after {} ms", after.as_millis()),
            Err(error) => format!("{error:#}"),
        };
        stage.expect_that(&stream.label, after.is_ok(), format!("within {PATIENCE:?}"), seen);
    }
    sleep(ACT);

    stage.columns("all the time", "sent     lost     left by net0");
    for Stream { label, tunnel, flow } in streams {
        let report = flow.stop()?;
        let (sent, lost, leaked) = (report.sent, report.lost(&["far end"]), report.count("net0"));
        // The other tunnel's packets are not to notice anything; this one's are lost while it is down, not before.
        let (holds, losses) = match tunnel {
            0 => (lost > 0 && lost < sent, "some"),
            _ => (lost == 0, "0"),
        };
        let row = |lost: &str, leaked| format!("{sent:<9}{lost:<9}{leaked}");
        stage.expect_that(&label, holds && leaked == 0, row(losses, 0), row(&lost.to_string(), leaked));
    }
    let foreign = |src: Option<IpAddr>| src.is_some_and(|src| OURS.contains(&src) || CLIENTS.contains(&src));
    let leaked = isp.drain()?.into_iter().filter(|frame| foreign(frame.src)).count();
    stage.expect("any of them seen by the ISP", &0, &leaked);
    Ok(())
}
