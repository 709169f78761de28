//! Random operations under traffic: what happens to a host in a year, in any order and with the daemon in any state.
//!
//! A run is repeated with `TUNROUTE_SEED=…`, and is longer with `TUNROUTE_OPERATIONS=…` (for each datapath).

use std::{
    env,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};
use fastrand::Rng;
use nix::sys::signal::Signal;
use tunroute::policy::net::{Family, PROTOCOL};
use tunroute_tests::{
    Capture, Daemon, DaemonOptions, Direction, Flow, FlowOptions, Seen, TUNNELS, TunnelKind, Watch, World, nft,
    pace::until,
    plan::{ISP, PLAIN_CLIENT, REMOTE},
    reach,
};

use super::scene::tell;

/// Operations for each datapath, and how many come between two looks at whether all is well.
const OPERATIONS: usize = 40;
const BETWEEN_LOOKS: usize = 10;
/// After so much time without a change, everything must be as configured.
const CALM: Duration = Duration::from_secs(2);
/// What is under way when a way is closed has arrived after this.
const UNDER_WAY: Duration = Duration::from_millis(300);
/// Packets per second of each flow.
const RATE: u32 = 300;
const DEVICE: &str = TUNNELS[0].device;
const AWAY: &str = "away0";
const RIGHT: &str = "right";

#[test]
fn kernel() -> Result<()> {
    run("kernel")
}

#[test]
fn both() -> Result<()> {
    run("both")
}

#[test]
fn ebpf() -> Result<()> {
    run("ebpf")
}

#[test]
fn shadow() -> Result<()> {
    run("shadow")
}

fn number(name: &str) -> Result<Option<u64>> {
    let value = env::var(name).ok();
    value.map(|value| value.parse().with_context(|| format!("{name}={value} is no number"))).transpose()
}

fn run(mode: &'static str) -> Result<()> {
    let seed = number("TUNROUTE_SEED")?.unwrap_or_else(|| u64::from(fastrand::u32(..)));
    let operations = number("TUNROUTE_OPERATIONS")?.map_or(Ok(OPERATIONS), usize::try_from)?;
    let again = format!("TUNROUTE_SEED={seed} TUNROUTE_OPERATIONS={operations} … faults::random::{mode}");
    tell(&again);
    let world = World::with(TunnelKind::Veth).build()?;
    let mut year = Year::new(&world, mode, seed)?;
    let mut looks = Vec::new();
    for step in 1..=operations {
        let result = year.step();
        result.with_context(|| format!("{again}\nafter {}\nlog:\n{}", year.history(), year.daemon.log()))?;
        if step % BETWEEN_LOOKS == 0 || step == operations {
            let look = year.calm_down();
            looks
                .push(look.with_context(|| format!("{again}\nafter {}\nlog:\n{}", year.history(), year.daemon.log()))?);
        }
    }
    let Year { flows, leaks, done, daemon, .. } = year;
    let mut sent = 0;
    for (flow, ..) in flows {
        sent += flow.stop()?.sent;
    }
    tell(&format!(
        "random {mode:6} {operations} operations, {sent} packets, {leaks} by the uplink in windows, calm {looks:.1?}"
    ));
    ensure!(sent > 0 && !done.is_empty(), "nothing happened");
    drop(daemon);
    Ok(())
}

/// What may be done to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// The tunnel's device is set down, or up again.
    LinkDown,
    /// The tunnel's device is deleted, or made again.
    Present,
    /// The tunnel's device is deleted, and an uplink is made with its number; or that goes, and the tunnel is made again.
    NumberReused,
    /// The tunnel's device gets another name, or its own again.
    Renamed,
    /// The devices of both tunnels exchange their names, or do so again.
    Exchanged,
    /// The uplink is set down and up, with its default routes made again.
    Uplink,
    /// An address in a new network comes to the LAN, or goes.
    Address,
    /// A route to a network behind the LAN comes to the main table, or goes.
    Inside,
    /// The default routes of the main table go and come again.
    Default,
    /// All rules of a family are flushed, and those of the kernel are made again.
    RulesFlushed,
    /// The tunnel's MTU changes.
    Mtu,
    /// All neighbours are flushed.
    Neighbours,
    /// The daemon is killed, or started again.
    Killed,
    /// The daemon is stopped (SIGSTOP), or goes on.
    Stopped,
    /// `down`, and a start.
    Down,
    /// The configuration changes by a policy.
    Reload,
    /// A configuration with a mistake is to be read.
    Refused,
    /// A netfilter table with a forward chain comes, or goes.
    Netfilter,
    /// The LAN's rp_filter is switched.
    ReversePath,
}

use Operation as Op;

const ALL: [Op; 19] = [
    Op::LinkDown,
    Op::Present,
    Op::NumberReused,
    Op::Renamed,
    Op::Exchanged,
    Op::Uplink,
    Op::Address,
    Op::Inside,
    Op::Default,
    Op::RulesFlushed,
    Op::Mtu,
    Op::Neighbours,
    Op::Killed,
    Op::Stopped,
    Op::Down,
    Op::Reload,
    Op::Refused,
    Op::Netfilter,
    Op::ReversePath,
];

/// How the daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Stopped,
    Dead,
}

/// The name that the device of tunnel 0 has, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    There,
    Down,
    Gone,
    /// An uplink has its number.
    Replaced,
    Away,
    Exchanged,
}

struct Year<'a> {
    world: &'a World,
    mode: &'static str,
    rng: Rng,
    config: String,
    daemon: Daemon<'a>,
    state: State,
    device: Device,
    address: bool,
    inside: bool,
    netfilter: bool,
    strict: bool,
    more: bool,
    flows: Vec<(Flow, Family)>,
    capture: Capture,
    /// Packets of policies that left by the uplink while nothing could keep them from it.
    leaks: usize,
    done: Vec<Op>,
}

impl<'a> Year<'a> {
    fn new(world: &'a World, mode: &'static str, seed: u64) -> Result<Self> {
        let config = format!("datapath = \"{mode}\"\n{}", world.config().replace("\"net0\"", "\"net*\""));
        let daemon = Daemon::start(world, &config, &DaemonOptions::default())?;
        let plan = &TUNNELS[0];
        let sources = [
            (&world.client, plan.client, Family::V4),
            (&world.client, plan.client, Family::V6),
            (&world.host, plan.host, Family::V6),
        ];
        let capture = Capture::everywhere(&world.isp)?;
        let mut flows = Vec::new();
        for (from, addrs, family) in sources {
            let (src, dst) = (addrs.of(family), REMOTE.of(family));
            reach(from, src, dst).with_context(|| format!("log:\n{}", daemon.log()))?;
            let watch = [(RIGHT, Watch::entering(&world.remote, plan.remote_device))];
            let options = FlowOptions { from, src, to: &world.remote, dst, rate: RATE, payload: 64, watch: &watch };
            flows.push((Flow::start(options)?, family));
        }
        Ok(Self {
            world,
            mode,
            rng: Rng::with_seed(seed),
            config,
            daemon,
            state: State::Running,
            device: Device::There,
            address: false,
            inside: false,
            netfilter: false,
            strict: false,
            more: false,
            flows,
            capture,
            leaks: 0,
            done: Vec::new(),
        })
    }

    fn history(&self) -> String {
        let done: Vec<String> = self.done.iter().map(|operation| format!("{operation:?}")).collect();
        format!("{} ({:?}, the tunnel's device {:?}, daemon {:?})", done.join(" "), self.mode, self.device, self.state)
    }

    /// Does something, after a moment of any length.
    fn step(&mut self) -> Result<()> {
        std::thread::sleep(Duration::from_millis(self.rng.u64(0..60)));
        let operation = ALL[self.rng.usize(..ALL.len())];
        self.done.push(operation);
        self.act(operation)?;
        self.no_leak()
    }

    fn host(&self, script: &str) -> Result<()> {
        self.world.host.ip(script)
    }

    fn act(&mut self, operation: Op) -> Result<()> {
        match operation {
            Op::LinkDown => match self.device {
                Device::There => self.become_(Device::Down),
                _ => self.become_(Device::There),
            },
            Op::Present => match self.device {
                Device::Gone => self.become_(Device::There),
                _ => self.become_(Device::Gone),
            },
            Op::NumberReused => match self.device {
                Device::Replaced => self.become_(Device::There),
                _ => self.become_(Device::Replaced),
            },
            Op::Renamed => match self.device {
                Device::Away => self.become_(Device::There),
                _ => self.become_(Device::Away),
            },
            Op::Exchanged => match self.device {
                Device::Exchanged => self.become_(Device::There),
                _ => self.become_(Device::Exchanged),
            },
            Op::Uplink => self.host(&format!("link set net0 down\nlink set net0 up\n{}", defaults("replace"))),
            Op::Address => {
                self.address = !self.address;
                let (action, nodad) = if self.address { ("add", "nodad") } else { ("del", "") };
                self.host(&format!(
                    "addr {action} 10.77.0.1/24 dev lan0\naddr {action} 2001:db8:77::1/64 dev lan0 {nodad}"
                ))
            }
            Op::Inside => {
                self.inside = !self.inside;
                let action = if self.inside { "add" } else { "del" };
                self.host(&format!(
                    "-4 route {action} 10.88.0.0/16 via {} dev lan0\n-6 route {action} 2001:db8:88::/48 via {} dev lan0",
                    PLAIN_CLIENT.v4, PLAIN_CLIENT.v6
                ))
            }
            Op::Default => self.host(&format!("{}{}", defaults("del"), defaults("add"))),
            Op::RulesFlushed => self.flush_rules(),
            Op::Mtu => {
                let mtu = [1280, 1300, 1400][self.rng.usize(..3)];
                if self.device == Device::There { self.host(&format!("link set {DEVICE} mtu {mtu}")) } else { Ok(()) }
            }
            Op::Neighbours => self.host("neigh flush all"),
            Op::Killed if self.state == State::Dead => self.start(),
            Op::Killed => {
                self.state = State::Dead;
                self.daemon.kill9().map(drop)
            }
            Op::Stopped => match self.state {
                State::Running => {
                    self.state = State::Stopped;
                    self.daemon.freeze()
                }
                State::Stopped => self.go_on(),
                State::Dead => Ok(()),
            },
            Op::Down => {
                if self.state == State::Stopped {
                    self.go_on()?;
                }
                if self.state == State::Dead {
                    self.start()?;
                }
                self.no_leak()?;
                self.daemon.down()?;
                self.start()?;
                // Nothing is kept from the uplink in between.
                self.window()
            }
            Op::Reload => {
                self.more = !self.more;
                self.reload()
            }
            Op::Refused => {
                if self.state != State::Running {
                    return Ok(());
                }
                self.daemon.write_config(&format!("{}\nnonsense = 1\n", self.config))?;
                let refused = !self.daemon.client(&["reload"])?.status.success();
                self.daemon.write_config(&self.wanted())?;
                ensure!(refused, "a configuration with a mistake was taken");
                Ok(())
            }
            Op::Netfilter => {
                self.netfilter = !self.netfilter;
                let add = self.netfilter;
                self.world.host.run_in(move || {
                    if add { nft::add_chain(nft::INET, Some(nft::FORWARD), &[]) } else { nft::delete_table(nft::INET) }
                })
            }
            Op::ReversePath => {
                self.strict = !self.strict;
                let value = if self.strict { "1" } else { "0" };
                self.world.host.sysctl(&[("ipv4/conf/lan0/rp_filter", value)])
            }
        }
    }

    /// Brings the tunnel's device into a state, by way of what it was at first.
    fn become_(&mut self, device: Device) -> Result<()> {
        let host = &self.world.host;
        let exchange = |one: &str, other: &str| {
            host.ip(&format!("link set {one} name {AWAY}\nlink set {other} name {one}\nlink set {AWAY} name {other}"))
        };
        let [one, other] = [TUNNELS[0].device, TUNNELS[1].device];
        match self.device {
            Device::There => {}
            Device::Down => self.world.set_tunnel(0, true)?,
            Device::Gone => self.world.set_present(0, true)?,
            Device::Replaced => {
                self.host("link del net1")?;
                self.world.set_present(0, true)?;
            }
            Device::Away => self.host(&format!("link set {AWAY} name {DEVICE}"))?,
            Device::Exchanged => exchange(one, other)?,
        }
        self.device = Device::There;
        match device {
            Device::There => {}
            Device::Down => self.world.set_tunnel(0, false)?,
            Device::Gone => self.world.set_present(0, false)?,
            Device::Replaced => {
                let index = self.world.host.ifindex(DEVICE)?;
                let isp = self.world.isp.name();
                // The new link takes any next hop.
                self.host(&format!(
                    "link del {DEVICE}\nlink add net1 index {index} type veth peer name spare netns {isp}\nlink set net1 arp off up"
                ))?;
                self.world.isp.ip("link set spare up")?;
            }
            Device::Away => self.host(&format!("link set {DEVICE} name {AWAY}"))?,
            Device::Exchanged => exchange(one, other)?,
        }
        self.device = device;
        Ok(())
    }

    fn flush_rules(&mut self) -> Result<()> {
        let version = if self.rng.bool() { "-4" } else { "-6" };
        let unguarded = matches!(self.mode, "kernel" | "shadow");
        if unguarded {
            self.no_leak()?;
        }
        self.host(&format!("{version} rule flush\n{version} rule add pref 32766 lookup main"))?;
        if unguarded {
            // Without rules and programs, nothing keeps packets from the uplink until the daemon has made the rules again.
            self.wake()?;
            let (host, own) = (&self.world.host, format!("proto {PROTOCOL}"));
            until("the rules are back", || {
                Ok(host.query("ip", &format!("{version} -details rule show"))?.contains(&own))
            })?;
            self.window()?;
        }
        Ok(())
    }

    fn wanted(&self) -> String {
        let more = "\n[[policy]]\nname = \"extra\"\nfrom = [\"2001:db8:e::/48\"]\nvia = [\"sixxs1\"]\n";
        if self.more { format!("{}{more}", self.config) } else { self.config.clone() }
    }

    fn reload(&mut self) -> Result<()> {
        self.daemon.write_config(&self.wanted())?;
        if self.state == State::Running {
            // A device that goes meanwhile keeps it from being applied in full: it is tried again when all is calm.
            self.daemon.client(&["reload"])?;
        }
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        self.daemon = Daemon::start(self.world, &self.wanted(), &DaemonOptions::default())?;
        self.state = State::Running;
        Ok(())
    }

    fn go_on(&mut self) -> Result<()> {
        self.state = State::Running;
        self.daemon.signal(Signal::SIGCONT)
    }

    /// Has the daemon run.
    fn wake(&mut self) -> Result<()> {
        match self.state {
            State::Running => Ok(()),
            State::Stopped => self.go_on(),
            State::Dead => self.start(),
        }
    }

    /// What left by an uplink, or came to be on any of its links, of a policy's.
    fn escaped(&mut self) -> Result<Vec<Seen>> {
        let plan = &TUNNELS[0];
        let is_own = |seen: &Seen| {
            let ours = |family| {
                let of_policy = [plan.client.of(family), plan.host.of(family)];
                seen.dst == Some(REMOTE.of(family)) && seen.src.is_some_and(|src| of_policy.contains(&src))
            };
            seen.direction == Direction::In && Family::ALL.into_iter().any(ours)
        };
        Ok(self.capture.drain()?.into_iter().filter(is_own).collect())
    }

    /// Nothing of a policy's has left by an uplink.
    fn no_leak(&mut self) -> Result<()> {
        let escaped = self.escaped()?;
        let Some(first) = escaped.first() else { return Ok(()) };
        bail!("{} packets left by an uplink, the first from {:?} by {}", escaped.len(), first.src, first.device)
    }

    /// What has left by an uplink up to now is not held against anybody.
    fn window(&mut self) -> Result<()> {
        std::thread::sleep(UNDER_WAY);
        self.leaks += self.escaped()?.len();
        Ok(())
    }

    /// Is all as it should be once nothing changes any more? Returns how long it took beyond the time of calm.
    fn calm_down(&mut self) -> Result<Duration> {
        self.wake()?;
        self.daemon.reload()?;
        std::thread::sleep(CALM);
        let calm = SystemTime::now();
        let up = self.device == Device::There;
        let state = match self.device {
            Device::There | Device::Exchanged => "up",
            Device::Down => "down",
            Device::Gone | Device::Replaced | Device::Away => "pending",
        };
        let policies = if self.more { 3 } else { 2 };
        self.daemon.wait_status(
            |status| {
                let active = status["policies"][0]["active"].as_object().into_iter().flatten();
                let active = active.map(|(_, device)| device == DEVICE);
                status["problems"] == serde_json::json!([])
                    && status["tunnels"][0]["state"] == state
                    && status["policies"].as_array().is_some_and(|all| all.len() == policies)
                    && active.into_iter().all(|active| active == (state == "up"))
            },
            tunroute_tests::pace::SOON,
        )?;
        for (command, expected) in [("plan", "nothing to do"), ("verify", "the datapaths agree")] {
            let mut said = String::new();
            let daemon = &self.daemon;
            let is_well = || {
                let output = daemon.client(&[command])?;
                said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
                Ok(output.status.success())
            };
            until(expected, is_well).with_context(|| format!("{command} says: {said}"))?;
        }
        let since = SystemTime::now();
        for (flow, family) in &self.flows {
            if up {
                flow.wait_for(RIGHT, since, tunroute_tests::pace::SOON)
                    .with_context(|| format!("{family} does not arrive"))?;
            }
        }
        if !up {
            std::thread::sleep(UNDER_WAY);
            let arrived: usize = self.flows.iter().map(|(flow, _)| flow.count_since(RIGHT, since)).sum();
            ensure!(arrived == 0, "{arrived} packets arrived without the tunnel");
        }
        self.no_leak()?;
        Ok(calm.elapsed()?)
    }
}

/// `ip route ACTION default …` by the uplink, in both families.
fn defaults(action: &str) -> String {
    format!("-4 route {action} default via {} dev net0\n-6 route {action} default via {} dev net0\n", ISP.v4, ISP.v6)
}
