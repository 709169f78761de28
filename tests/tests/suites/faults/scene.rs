//! A world under a steady packet flow, with foreign state planted, to which something happens.

use std::{
    io::Write as _,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use tunroute::policy::net::{Family, PROTOCOL};
use tunroute_tests::{
    Daemon, DaemonOptions, Flow, FlowOptions, FlowReport, ForeignProgram, Netns, Snapshot, TUNNELS, TunnelKind, Watch,
    World,
    pace::patience,
    plan::{REMOTE, REMOTE_ISP_DEVICE},
    reach,
};

/// What others have removed is back, and what has happened is followed, within a second; on a busy machine, before this.
/// Packets flow again on a device that comes back before this, too, as the lab's devices ask for a neighbour every 50 ms.
/// What the daemon misses it comes across later, when it looks at everything, twice a minute.
pub const IN_TIME: Duration = Duration::from_secs(10);
/// What is under way when a way is closed has arrived after this.
const UNDER_WAY: Duration = Duration::from_millis(200);
/// Packets per second of each flow.
const RATE: u32 = 2000;
/// Where the packets of policy 0 belong, where those of policy 1 do, and where none may be seen.
const RIGHT: &str = "right";
const WRONG: &str = "wrong";
const UPLINK: &str = "uplink";
const ISP: &str = "isp";

/// What a fault happens to.
pub struct Setting {
    pub kind: TunnelKind,
    pub mode: &'static str,
    pub family: Family,
    pub present: [bool; 2],
    /// Changes the story's configuration.
    pub config: fn(String) -> String,
    pub options: DaemonOptions,
    /// Lines of the foreign state that the fault itself changes contain one of these.
    pub changed: &'static [&'static str],
    /// No packet may be lost.
    pub lossless: bool,
}

impl Setting {
    pub fn new(mode: &'static str) -> Self {
        Self {
            kind: TunnelKind::Veth,
            mode,
            family: Family::V6,
            present: [true; 2],
            config: |config| config,
            options: DaemonOptions::default(),
            changed: &[],
            lossless: false,
        }
    }

    pub fn lossless(self) -> Self {
        Self { lossless: true, ..self }
    }

    /// Lets the fault happen and checks what must be true whatever happens: nothing of a policy's leaves by the uplink or
    /// by another tunnel, and what is somebody else's stays as it is.
    pub fn run(self, name: &str, fault: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
        let world = World::with(self.kind).tunnels_present(self.present).build()?;
        let _programs = plant_foreign(&world)?;
        let config = format!("datapath = \"{}\"\n{}", self.mode, (self.config)(world.config()));
        let daemon = Daemon::start(&world, &config, &self.options)?;
        let plan = &TUNNELS[0];
        let (client, own, dst) = (plan.client.of(self.family), plan.host.of(self.family), REMOTE.of(self.family));
        let mut flows = Vec::new();
        if self.present[0] {
            for (netns, src) in [(&world.client, client), (&world.host, own)] {
                // Neighbours are resolved before the flow starts, since an unresolved one loses packets.
                reach(netns, src, dst).with_context(|| format!("log:\n{}", daemon.log()))?;
            }
        }
        let watch = [
            (RIGHT, Watch::entering(&world.remote, plan.remote_device)),
            (WRONG, Watch::entering(&world.remote, TUNNELS[1].remote_device)),
            (UPLINK, Watch::leaving(&world.host, "net0")),
            (ISP, Watch::entering(&world.remote, REMOTE_ISP_DEVICE)),
        ];
        let sources = [Some((&world.client, client)), self.present[0].then_some((&world.host, own))];
        for (from, src) in sources.into_iter().flatten() {
            let options = FlowOptions { from, src, to: &world.remote, dst, rate: RATE, payload: 64, watch: &watch };
            flows.push(Flow::start(options)?);
        }
        let mut scene = Scene { world: &world, daemon, config, flows, family: self.family, times: Vec::new() };
        let foreign = |scene: &Scene<'_>| scene.foreign(self.changed);
        let before = foreign(&scene)?;
        if self.present[0] {
            scene.flows_again("first", IN_TIME)?;
        }
        let happened = fault(&mut scene).with_context(|| format!("{name} ({})", self.mode));
        happened.with_context(|| format!("the daemon's log:\n{}", scene.daemon.log()))?;
        std::thread::sleep(Duration::from_millis(100));
        let as_before = before.wait_same(|| foreign(&scene));
        let Scene { daemon, flows, times, .. } = scene;
        let reports: Vec<FlowReport> = flows.into_iter().map(Flow::stop).collect::<Result<_>>()?;
        let sum = |place| reports.iter().map(|report| report.count(place)).sum::<usize>();
        let sent: u64 = reports.iter().map(|report| report.sent).sum();
        let lost: u64 = reports.iter().map(|report| report.lost(&[RIGHT])).sum();
        let (leaked, wrong) = (sum(UPLINK).max(sum(ISP)), sum(WRONG));
        let times: Vec<String> = times.iter().map(|(what, time)| format!("{what} {time:.0?}")).collect();
        tell(&format!(
            "fault {name:34} {:6} {sent:6} sent {lost:6} lost {leaked} leaked {wrong} to a wrong device; {}",
            self.mode,
            times.join(", ")
        ));
        ensure!(leaked == 0, "{name}: {leaked} packets left by the uplink; log:\n{}", daemon.log());
        ensure!(wrong == 0, "{name}: {wrong} packets took another tunnel; log:\n{}", daemon.log());
        ensure!(!self.lossless || lost == 0, "{name}: {lost} of {sent} packets were lost; log:\n{}", daemon.log());
        as_before.with_context(|| format!("{name}: foreign state; log:\n{}", daemon.log()))
    }
}

/// A running scene.
pub struct Scene<'a> {
    pub world: &'a World,
    pub daemon: Daemon<'a>,
    pub config: String,
    flows: Vec<Flow>,
    family: Family,
    /// How long things took.
    times: Vec<(String, Duration)>,
}

impl Scene<'_> {
    /// Waits until something is so, which must be before the limit.
    pub fn within(&mut self, what: &str, limit: Duration, mut so: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let started = Instant::now();
        while !so(self).with_context(|| what.to_owned())? {
            ensure!(started.elapsed() < patience(limit), "not in {limit:?}: {what}");
            std::thread::sleep(patience(Duration::from_millis(2)));
        }
        self.times.push((what.to_owned(), started.elapsed()));
        Ok(())
    }

    /// Waits until each flow arrives again where it belongs.
    pub fn flows_again(&mut self, what: &str, limit: Duration) -> Result<()> {
        let now = SystemTime::now();
        let mut longest = Duration::ZERO;
        for flow in &self.flows {
            let first = flow.wait_for(RIGHT, now, limit).with_context(|| what.to_owned())?;
            longest = longest.max(first.at.duration_since(now).unwrap_or_default());
        }
        self.times.push((what.to_owned(), longest));
        Ok(())
    }

    /// Packets of the forwarded flow that have arrived where they belong.
    pub fn forwarded(&self) -> usize {
        self.flows.first().map_or(0, |flow| flow.count(RIGHT))
    }

    /// Nothing of the forwarded flow arrives while one waits.
    pub fn ensure_silence(&self, time: Duration) -> Result<()> {
        let since = SystemTime::now() + UNDER_WAY;
        std::thread::sleep(UNDER_WAY + time);
        let more = self.flows.first().map_or(0, |flow| flow.count_since(RIGHT, since));
        ensure!(more == 0, "{more} packets arrived");
        Ok(())
    }

    pub fn host(&self, script: &str) -> Result<()> {
        self.world.host.ip(script)
    }

    /// What `ip ARGS` says in the host.
    pub fn ip(&self, args: &str) -> Result<String> {
        self.world.host.query("ip", args)
    }

    /// Tunroute's own rules, as `ip rule del` takes them.
    pub fn own_rules(&self) -> Result<Vec<String>> {
        let own = format!("proto {PROTOCOL}");
        let rules = self.ip(&format!("{} -details rule show", self.version()))?;
        // "20032: from 2a02::1 lookup 200 proto 116 unicast"
        let mut rules: Vec<String> = rules
            .lines()
            .filter(|line| line.contains(&own))
            .filter_map(|line| line.split_once(':'))
            .map(|(pref, rest)| format!("pref {pref} {}", rest.replace(" unicast", "").trim()))
            .collect();
        // Among rules of one priority the order changes, and means nothing.
        rules.sort();
        Ok(rules)
    }

    pub fn version(&self) -> &'static str {
        if self.family == Family::V4 { "-4" } else { "-6" }
    }

    /// The table of policy 0.
    pub fn table(&self) -> Result<u64> {
        self.daemon.status()?["policies"][0]["table"].as_u64().context("policy 0 has no table")
    }

    /// The routes of a table, one a line.
    pub fn routes(&self, table: u64) -> Result<Vec<String>> {
        // A table without routes is an error to `ip`.
        let routes = self.ip(&format!("{} route show table {table}", self.version())).unwrap_or_default();
        Ok(routes.lines().map(|line| line.trim().to_owned()).collect())
    }

    /// How many lines of the log since `from` contain the words.
    pub fn said(&self, from: usize, words: &str) -> usize {
        self.daemon.log().get(from..).unwrap_or_default().lines().filter(|line| line.contains(words)).count()
    }

    /// The present end of the log.
    pub fn log_end(&self) -> usize {
        self.daemon.log().len()
    }

    /// Renames a device, which before Linux 6.2 must be down for that.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let rename = format!("link set {from} name {to}");
        self.host(&rename).or_else(|_| self.host(&format!("link set {from} down\n{rename}\nlink set {to} up")))
    }

    /// As [`programs`], in the host.
    pub fn programs(&self, device: &str, hook: &str) -> Result<usize> {
        programs(&self.world.host, device, hook)
    }

    /// The state of tunnel 0 in `status`.
    pub fn tunnel_is(&self, state: &str) -> Result<bool> {
        Ok(self.daemon.status()?["tunnels"][0]["state"] == state)
    }

    /// Everything in the host but what is tunroute's, the tunnels and what the fault is about.
    fn foreign(&self, changed: &[&str]) -> Result<Snapshot> {
        let own = format!("proto {PROTOCOL}");
        Ok(self.world.host.snapshot()?.without(|section, line| {
            section == "ip link"
                || section.ends_with("addr")
                || line.contains(&own)
                || line.starts_with("tcx ") && is_ours(line)
                || section.starts_with("tc filter") && line.contains(OUR_FILTERS)
                || TUNNELS.iter().any(|plan| line.contains(plan.device))
                || changed.iter().any(|part| line.contains(part) || section.contains(part))
        }))
    }
}

/// What is said of this project's filters, where it is attached by them.
pub const OUR_FILTERS: &str = "pref 2 ";

/// Number of programs of this project on a hook of a device, attached in one way or the other. They run before all others.
pub fn programs(host: &Netns, device: &str, hook: &str) -> Result<usize> {
    // tc fails where there is no clsact to ask.
    let filters = host.query("tc", &format!("filter show dev {device} {hook}")).unwrap_or_default();
    let filters = filters.lines().filter(|line| line.contains(" handle ")).map(str::to_owned).collect();
    let mut all = 0;
    for programs in [host.tcx(device, hook)?, filters] {
        let ours = programs.iter().take_while(|name| is_ours(name)).count();
        ensure!(!programs.iter().skip(ours).any(|name| is_ours(name)), "{device} {hook}: {programs:?}");
        all += ours;
    }
    Ok(all)
}

/// Is this program this project's?
fn is_ours(program: &str) -> bool {
    program.contains("gress_l")
}

/// What others have on the host: rules, one at a priority of tunroute's own, a table with the policy's source in mind,
/// filters, and programs beside tunroute's. None of it matches what enters by `lan0`, else the fast path would step aside.
fn plant_foreign(world: &World) -> Result<Vec<ForeignProgram>> {
    let prefix = TUNNELS[0].prefix;
    let mut script = String::new();
    for (version, prefix, base) in [("-4", prefix.v4.to_string(), 113), ("-6", prefix.v6.to_string(), 81)] {
        script += &format!(
            "{version} rule add pref {} from {prefix} iif net0 lookup 999\n\
             {version} rule add pref 30000 from {prefix} lookup 999\n\
             {version} rule add pref 30001 fwmark 0x77 lookup 998\n\
             {version} route add blackhole {} table 998\n\
             {version} route add unreachable {} table 999 metric 7\n",
            20000 + base,
            if version == "-4" { "203.0.113.128/25" } else { "2001:db8:dead::/48" },
            if version == "-4" { "203.0.113.192/26" } else { "2001:db8:beef::/48" },
        );
    }
    world.host.ip(&script)?;
    for device in ["lan0", "net0"] {
        world.host.query("tc", &format!("qdisc add dev {device} clsact"))?;
        for hook in ["ingress", "egress"] {
            // "return TC_ACT_UNSPEC"
            let filter =
                ["filter", "add", "dev", device, hook, "prio", "9", "bpf", "da", "bytecode", "1,6 0 0 4294967295,"];
            world.host.run("tc", &filter)?;
        }
    }
    [("lan0", true), ("lan0", false), ("net0", true), ("net0", false)]
        .map(|(device, ingress)| ForeignProgram::attach(&world.host, device, ingress))
        .into_iter()
        .collect()
}

/// Prints a line that is seen although the test passes.
pub fn tell(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
