//! One owner of all state. Every event only marks something dirty; one pass observes, compiles, plans and applies.

mod apply;
mod check;
mod confirm;
mod down;
mod endpoint;
mod explain;
mod fast_path;
mod gates;
mod load;
mod messages;
mod preview;
mod read;
mod reload;
mod report;
mod requests;
mod tables;
mod trace;
mod xdp;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::MissedTickBehavior,
};
use tracing::{info, warn};

use self::{
    down::clean,
    messages::{log_plan, report_removed},
};
pub use self::{down::down_without_daemon, preview::preview_without_daemon};
use crate::{
    config::{Config, Datapath},
    control::metrics::{self, Instruments},
    control::socket::{self as control, Answer, Call},
    datapath::{self, Method},
    exits::health::{self, Probes},
    exits::supervise::Supervisor,
    host::instance::{Instance, NamespaceLock},
    host::service::Service,
    host::state::StateDir,
    kernel::{Change, Events, Kernel, KernelError, Kinds, Snapshot, rules_digest},
    policy::compile::{Desired, Inputs, Sources, compile, follow},
    policy::devices::matching,
    policy::fast::Hook,
    policy::net::{Family, IfIndex, KernelState, Link, is_link_local},
    policy::plan::{Op, PlanError, Undone, plan, plan_failover},
};

/// Interval between heartbeats, each with a check of the attachments: well below [`datapath::HEARTBEAT_VALID`], and
/// short enough that removed programs are back within a second.
const AUDIT: Duration = Duration::from_millis(500);
/// Interval between full checks: notifications may be lost without a sign.
const FULL_CHECK: Duration = Duration::from_secs(30);
/// Pause before a failed operation is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Minimum pause between repairs: two managers that remove each other's rules must not burn a CPU.
const REPAIR_PAUSE: Duration = Duration::from_millis(100);
/// Maximum time from a packet's routing decision to its departure, even if its sender waits for a CPU in between.
const UNDER_WAY: Duration = Duration::from_millis(100);

/// What the daemon is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Socket and record.
    pub runtime_dir: PathBuf,
    /// Everything else that it keeps.
    pub instance: Instance,
    /// Instead of the configuration's.
    pub datapath: Option<Datapath>,
    /// Instead of what the kernel offers.
    pub method: Option<Method>,
    /// Remove everything at the end.
    pub down_on_exit: bool,
}

/// The state that the passes work on.
struct Daemon {
    options: Options,
    config: Config,
    kernel: Kernel,
    snapshot: Option<Snapshot>,
    /// What the last pass made of the configuration in force.
    desired: Option<Desired>,
    /// The prefixes of the configuration in force, as they were compiled last.
    sources: Option<Arc<Sources>>,
    /// The programs, unless the datapath is `kernel` or they could not be loaded.
    fast: Option<datapath::Datapath>,
    /// Why there are none although there should be.
    fast_error: Option<String>,
    /// What is being loaded beside everything else.
    loader: load::Loader,
    /// No programs are loaded yet, and an earlier daemon's are in place.
    adopting: bool,
    /// The task that forwards what the programs log.
    program_log: JoinSet<()>,
    /// In `ebpf` mode: the programs are not all in place, so the rules stand in for them.
    fallback: bool,
    /// What the configuration asks for does not fit the fast path's maps, so it is the kernel's alone.
    too_large: Option<PlanError>,
    gates: gates::Gates,
    xdp: xdp::Xdp,
    tables: tables::Tables,
    supervisor: Supervisor,
    probes: Probes,
    checker: check::Checker,
    /// Tunnels that their probes hold to be down.
    failed: BTreeSet<(String, Family)>,
    state: Arc<StateDir>,
    service: Service,
    /// Prefixes of interfaces that policies follow and do not get.
    contested: Vec<String>,
    /// What could not be done in the last pass.
    problems: Vec<String>,
    /// Changes that wait for others, as commands.
    put_off: Vec<String>,
    /// What could not be done in the pass before, and has been logged.
    logged: Vec<String>,
    /// The way to this daemon's own control requests.
    calls: mpsc::Sender<Call>,
    reader: read::Reader,
    instruments: Instruments,
    endpoint: Option<metrics::Server>,
    /// Why there is none although there should be.
    endpoint_error: Option<String>,
    /// The programs' map of prefixes is too small; this many words are needed. Others are loaded to take their place.
    outgrown: Option<u64>,
    /// The client that traces decisions.
    listener: Option<trace::Listener>,
    /// The configuration in force is on trial.
    trial: Option<confirm::Trial>,
    /// The configuration file was tried and not confirmed.
    undone: bool,
    /// When to try again what could not be done, or to look at what was postponed.
    retry: Option<tokio::time::Instant>,
    /// When what others had removed was restored last.
    repaired: Option<tokio::time::Instant>,
    /// What has changed since.
    postponed: Kinds,
    started: Instant,
}

/// Why the daemon stops.
enum Exit {
    /// The datapaths stay.
    Leave,
    /// Everything is removed; a client may wait for that.
    Down(Option<oneshot::Sender<Answer>>),
}

/// Runs the daemon until it is stopped. The service manager is kept informed.
///
/// # Errors
///
/// If it cannot start: another one has the directory or the namespace, or the kernel cannot be reached.
pub async fn run(options: Options, config: Config) -> anyhow::Result<()> {
    let state = Arc::new(StateDir::open(&options.instance.state_dir)?);
    let lock = NamespaceLock::take()?;
    let runtime_lock = options.instance.record(&options.runtime_dir)?;
    let mut signals = Signals::catch()?;
    let (kernel, mut events) = Kernel::connect()?;
    let (verdicts, changed_verdicts) = mpsc::unbounded_channel();
    let (calls, requests) = control::channel();
    let (verified, verifications) = mpsc::unbounded_channel();
    let (loaded, loads) = mpsc::unbounded_channel();
    let (read, configurations) = mpsc::unbounded_channel();
    let mut daemon = Daemon {
        tables: tables::Tables::load(&state),
        config: with_datapath(config, options.datapath),
        options,
        kernel,
        snapshot: None,
        desired: None,
        sources: None,
        fast: None,
        fast_error: None,
        loader: load::Loader::new(loaded),
        adopting: false,
        program_log: JoinSet::new(),
        fallback: false,
        too_large: None,
        gates: gates::Gates::default(),
        xdp: xdp::Xdp::default(),
        supervisor: Supervisor::new(Arc::clone(&state)),
        probes: Probes::new(verdicts),
        checker: check::Checker::new(verified),
        failed: BTreeSet::new(),
        state,
        service: Service::detect(),
        contested: Vec::new(),
        problems: Vec::new(),
        put_off: Vec::new(),
        logged: Vec::new(),
        calls,
        reader: read::Reader::start(read),
        instruments: Instruments::default(),
        endpoint: None,
        endpoint_error: None,
        outgrown: None,
        listener: None,
        trial: None,
        undone: false,
        retry: None,
        repaired: None,
        postponed: Kinds::NONE,
        started: Instant::now(),
    };
    // Requests are answered from here on, after the first pass.
    control::listen(&daemon.options.runtime_dir, daemon.calls.clone())?;
    daemon.configure_tunnels();
    daemon.reconcile(Kinds::ALL).await;
    daemon.update_endpoint().await;
    info!("ready");
    daemon.service.ready();
    let mut inbox = Inbox { requests, verdicts: changed_verdicts, verifications, configurations, loaded: loads };
    let exit = daemon.serve(&mut events, &mut inbox, &mut signals).await?;
    daemon.service.stopping();
    daemon.undo_trial().await;
    match exit {
        Exit::Leave if !daemon.options.down_on_exit => info!("stopping; the datapaths stay in place"),
        Exit::Leave => daemon.down(&mut inbox).await?,
        Exit::Down(answer) => {
            let result = daemon.down(&mut inbox).await;
            // The client may start the next daemon at once.
            drop((lock, runtime_lock));
            if let Some(answer) = answer {
                let told = match &result {
                    Ok(()) => Answer::Done,
                    Err(error) => Answer::Failed(format!("{error:#}")),
                };
                let _nobody_waits = answer.send(told);
                // The connection's task gets its turn to write the answer before the runtime ends.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            result?;
        }
    }
    Ok(())
}

/// What comes from the daemon's own tasks and threads.
struct Inbox {
    requests: mpsc::Receiver<Call>,
    verdicts: mpsc::UnboundedReceiver<health::Change>,
    verifications: mpsc::UnboundedReceiver<check::Verified>,
    configurations: mpsc::UnboundedReceiver<read::Read>,
    loaded: mpsc::UnboundedReceiver<load::Loaded>,
}

/// What the daemon is told by signals. Caught from the start, so that none ends it in the middle of a pass.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn catch() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

/// Waits for a moment, for ever if there is none.
async fn at(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn with_datapath(config: Config, datapath: Option<Datapath>) -> Config {
    Config { datapath: datapath.unwrap_or(config.datapath), ..config }
}

impl Daemon {
    async fn serve(&mut self, events: &mut Events, inbox: &mut Inbox, signals: &mut Signals) -> anyhow::Result<Exit> {
        let mut audit = tokio::time::interval(AUDIT);
        audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut full_check = tokio::time::interval_at(tokio::time::Instant::now() + FULL_CHECK, FULL_CHECK);
        full_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Rules may be many, so they are read beside everything else: a failover does not wait for it.
        let mut digests = JoinSet::new();
        loop {
            let (retry, trial_ends) = (at(self.retry), at(self.trial_ends()));
            tokio::select! {
                change = events.next() => self.follow(&change?).await,
                Some(call) = inbox.requests.recv() => {
                    if let Some(exit) = self.answer(call).await {
                        return Ok(exit);
                    }
                }
                Some(verdict) = inbox.verdicts.recv() => {
                    self.enter_verdict(verdict);
                    self.reconcile(Kinds::NONE).await;
                }
                Some(verified) = inbox.verifications.recv() => self.finish_verify(verified).await,
                Some(read) = inbox.configurations.recv() => self.finish_read(read).await,
                Some(loaded) = inbox.loaded.recv() => self.finish_load(loaded).await,
                _ = audit.tick() => {
                    self.audit().await;
                    self.sample().await;
                }
                () = trial_ends => self.undo_trial().await,
                () = retry => self.reconcile(Kinds::BUT_RULES).await,
                _ = full_check.tick() => {
                    self.reconcile(Kinds::BUT_RULES).await;
                    digests.spawn(rules_digest());
                }
                Some(digest) = digests.join_next() => self.check_rules(digest?).await,
                _ = signals.hangup.recv() => self.read(read::Purpose::Reload, None),
                _ = signals.terminate.recv() => return Ok(Exit::Leave),
                _ = signals.interrupt.recv() => return Ok(Exit::Leave),
            }
        }
    }

    /// What has changed is looked at at once; but after a repair, what others do to rules and routes waits a little. What
    /// becomes of devices never does.
    async fn follow(&mut self, change: &Change) {
        let now = tokio::time::Instant::now();
        if let Some(pause_ends) = self.repaired.map(|repaired| repaired + REPAIR_PAUSE).filter(|end| *end > now)
            && !change.kinds.contains(Kinds::LINKS)
        {
            self.postponed |= change.kinds;
            self.retry = Some(self.retry.map_or(pause_ends, |retry| retry.min(pause_ends)));
            return;
        }
        if report_removed(change) {
            self.repaired = Some(now);
            self.instruments.repair();
        }
        self.reconcile(change.kinds).await;
    }

    /// Observes the rules if they are not as known.
    async fn check_rules(&mut self, digest: Result<u64, KernelError>) {
        match digest {
            Ok(digest) if self.snapshot.as_ref().is_some_and(|known| known.rules_digest() == digest) => {}
            Ok(_) => self.reconcile(Kinds::RULES).await,
            Err(error) => warn!("{error}"),
        }
    }

    /// Tells the supervisor and the probes which tunnels there are.
    fn configure_tunnels(&mut self) {
        self.supervisor.reconfigure(&self.config.tunnels);
        self.probes.reconfigure(&self.config.tunnels);
        self.failed.retain(|(tunnel, family)| !self.probes.is_up(tunnel, *family));
    }

    fn enter_verdict(&mut self, health::Change { tunnel, family, up }: health::Change) {
        if up {
            info!("tunnel {tunnel} answers its {family} probes again");
            self.failed.remove(&(tunnel, family));
        } else {
            warn!("tunnel {tunnel} does not answer its {family} probes");
            self.failed.insert((tunnel, family));
        }
    }

    /// Tells the supervisor and the probes which devices have come up or gone.
    fn tell_devices(&self, before: Option<&BTreeMap<IfIndex, Link>>, kernel: &KernelState) {
        let now = &kernel.links;
        for tunnel in &self.config.tunnels {
            let up = |links: &BTreeMap<IfIndex, Link>| links.values().any(|link| link.name == tunnel.name && link.up);
            // That it is missing is not said before its command could do something about it.
            if up(now) || online(&self.config, kernel) {
                self.supervisor.device_up(&tunnel.name, up(now));
            }
            if before.is_some_and(|before| up(before) != up(now)) {
                self.probes.nudge(&tunnel.name);
            }
        }
    }

    /// Makes the system what the configuration says, and begins to load the programs that are missing.
    async fn reconcile(&mut self, dirty: Kinds) {
        self.settle(dirty).await;
        if self.load_programs() {
            self.settle(Kinds::NONE).await;
        }
    }

    /// One pass: observes what is dirty, and makes the system what the configuration says, with the programs there are.
    async fn settle(&mut self, dirty: Kinds) {
        let start = Instant::now();
        self.checker.note_change();
        let dirty = dirty | std::mem::take(&mut self.postponed);
        self.logged = std::mem::take(&mut self.problems);
        if let Err(error) = self.pass(dirty).await {
            self.problem(format!("{error:#}"));
        }
        if self.was_refused()
            && let Err(error) = self.pass(Kinds::NONE).await
        {
            self.problem(format!("{error:#}"));
        }
        // In `ebpf` mode, one more pass if the programs' being in place has changed whether rules are needed.
        if self.update_fallback()
            && let Err(error) = self.pass(Kinds::NONE).await
        {
            self.problem(format!("{error:#}"));
        }
        if self.problems.is_empty()
            && let Some(fast) = &self.fast
        {
            fast.forget_other_layouts();
        }
        if self.is_verifying() {
            self.publish_wanted();
        }
        self.checker.note_change();
        self.retry = (!self.problems.is_empty()).then(|| tokio::time::Instant::now() + RETRY);
        self.service.status(self.summary());
        self.instruments.pass(start.elapsed());
    }

    async fn pass(&mut self, dirty: Kinds) -> anyhow::Result<()> {
        let links_before = self.snapshot.as_ref().map(|snapshot| snapshot.state.links.clone());
        let dirty = dirty | self.fail_over(dirty).await?;
        let before = self.snapshot.take();
        let snapshot = self.kernel.observe(dirty, before).await?;
        let snapshot = self.withdraw(snapshot).await?;
        self.tell_devices(links_before.as_ref(), &snapshot.state);
        self.restore_pins();
        self.look_for_earlier_programs(&snapshot.state);
        self.follow_interfaces(&snapshot.state);
        let config = &self.config;
        let changed = self.tables.update(config, &snapshot.state, &self.state);
        if changed && let Err(error) = self.options.instance.name_tables(self.tables.names(config)) {
            warn!("cannot write the tables' names for iproute2: {error}; rules and routes show numbers");
        }
        let gates = gates::Gates::look(config, &snapshot.state, self.tables.numbers()).await;
        if !config_wants_no_fast_path(config) {
            gates.log_since(&self.gates);
        }
        self.gates = gates;
        let filters = self.filters(&snapshot.state).await?;
        if let Some(fast) = &mut self.fast {
            fast.observe_attachments(&snapshot.state.links, &filters)?;
        }
        self.look_for_xdp(&snapshot.state).await;
        // Known before anything is changed: rules that are there stay.
        self.fallback |= self.needs_rules();
        let (desired, operations) = self.plan(&snapshot)?;
        log_plan(&operations);
        self.ask_for_gateways(Some(&desired), &snapshot.state).await;
        let mut undone = Undone::new(&desired);
        let changed = self.apply(&operations, &snapshot, &mut undone).await;
        self.close_fast_path(&undone);
        let rules_in_place = undone.rules_in_place();
        self.put_off = undone.put_off();
        // What was planned is not necessarily what is: look.
        self.snapshot = Some(self.kernel.observe(changed, Some(snapshot)).await?);
        if let Some(fast) = &desired.fast {
            self.sources = Some(Arc::clone(&fast.sources));
        }
        self.desired = Some(desired);
        if rules_in_place { self.remove_fast_path().await } else { Ok(()) }
    }

    /// The policies' sources are what is on the link at the interfaces that they follow.
    fn follow_interfaces(&mut self, kernel: &KernelState) {
        let contested = follow(&mut self.config, kernel);
        for problem in contested.iter().filter(|problem| !self.contested.contains(problem)) {
            warn!("{problem}");
        }
        self.contested = contested;
    }

    /// The programs in filters on ingress and uplink devices, where programs are attached that way.
    async fn filters(&self, kernel: &KernelState) -> anyhow::Result<BTreeSet<(Hook, IfIndex, u32)>> {
        if self.fast.as_ref().is_none_or(|fast| fast.method() == Method::Tcx) {
            return Ok(BTreeSet::new());
        }
        let interfaces = &self.config.interfaces;
        let limited = self.config.tunnels.iter().filter(|tunnel| tunnel.mss.is_some());
        let limited = limited.filter_map(|tunnel| kernel.link(&tunnel.name));
        let devices = matching(&interfaces.ingress, kernel).chain(matching(&interfaces.uplink, kernel)).chain(limited);
        let devices = devices.map(|link| link.index).chain(self.gates.returning().iter().copied());
        Ok(self.kernel.bpf_filters(devices).await?)
    }

    /// What cannot wait for a look at everything: routes and slots follow the tunnels, however many prefixes there are.
    /// Returns what has to be observed anew.
    async fn fail_over(&mut self, dirty: Kinds) -> anyhow::Result<Kinds> {
        let Some(mut desired) = self.desired.take() else { return Ok(Kinds::NONE) };
        let Some(mut snapshot) = self.snapshot.take() else { return Ok(Kinds::NONE) };
        if dirty.contains(Kinds::LINKS) {
            snapshot = self.kernel.observe_devices(snapshot).await?;
        }
        desired.follow_tunnels(&self.inputs(&self.config, &snapshot));
        self.enter_disputes(&self.config, &mut desired);
        let operations = plan_failover(&desired, &snapshot.state, self.fast.as_ref().map(datapath::Datapath::state))?;
        log_plan(&operations);
        // What fails here, on a device that has just gone perhaps, is planned again from a full observation.
        let problems = std::mem::take(&mut self.problems);
        let changed = self.apply(&operations, &snapshot, &mut Undone::new(&desired)).await;
        self.problems = problems;
        self.snapshot = Some(snapshot);
        self.desired = Some(desired);
        Ok(changed)
    }

    /// A destination that the main table no longer leads inside for is no longer exempt: its packets would leave by an uplink.
    /// The rest of a pass takes longer.
    async fn withdraw(&mut self, snapshot: Snapshot) -> anyhow::Result<Snapshot> {
        let Some(mut desired) = self.desired.take() else { return Ok(snapshot) };
        let changed = if desired.follow_routes(&self.inputs(&self.config, &snapshot)) {
            let fast = self.fast.as_ref().map(datapath::Datapath::state);
            let operations = plan_failover(&desired, &snapshot.state, fast)?;
            log_plan(&operations);
            self.apply(&operations, &snapshot, &mut Undone::new(&desired)).await
        } else {
            Kinds::NONE
        };
        self.desired = Some(desired);
        Ok(self.kernel.observe(changed, Some(snapshot)).await?)
    }

    /// What both datapaths are to look like now, and what leads there. A reload is refused if it does not fit the maps; but
    /// a daemon that starts, or whose host got more prefixes, must not leave everything as it happens to be.
    fn plan(&mut self, snapshot: &Snapshot) -> Result<(Desired, Vec<Op>), PlanError> {
        let before = self.too_large.take();
        let desired = self.desired_of(&self.config, snapshot);
        let fast = self.fast.as_ref().map(datapath::Datapath::state);
        match plan(&desired, &snapshot.state, fast) {
            Ok(operations) => return Ok((desired, operations)),
            Err(error) => {
                if before != Some(error) {
                    warn!("the kernel's rules carry all traffic: {error}");
                }
                self.too_large = Some(error);
            }
        }
        let desired = compile(&Inputs { fast: None, rules: true, ..self.inputs(&self.config, snapshot) });
        let operations = plan(&desired, &snapshot.state, fast)?;
        Ok((desired, operations))
    }

    /// What both datapaths are to look like now, with this configuration.
    fn desired_of(&self, config: &Config, snapshot: &Snapshot) -> Desired {
        let mut desired = compile(&self.inputs(config, snapshot));
        self.enter_disputes(config, &mut desired);
        desired
    }

    fn inputs<'a>(&'a self, config: &'a Config, snapshot: &'a Snapshot) -> Inputs<'a> {
        let wanted = !wants_no_programs(config);
        Inputs {
            config,
            kernel: &snapshot.state,
            tables: self.tables.numbers(),
            failed: &self.failed,
            rules: config.datapath != Datapath::Ebpf || self.fallback,
            fast: (wanted && self.fast.is_some()).then(|| self.gates.inputs(&self.xdp.chosen)),
            before: self.sources.as_ref().filter(|_| std::ptr::eq(config, &raw const self.config)),
        }
    }

    /// The heartbeat, and a check of what sends no notification: programs, pins and gates.
    async fn audit(&mut self) {
        self.service.alive();
        self.end_tracing();
        self.update_endpoint().await;
        let Some(snapshot) = &self.snapshot else { return };
        let filters = self.filters(&snapshot.state).await.unwrap_or_else(|error| {
            warn!("{error}");
            BTreeSet::new()
        });
        let Some(fast) = &mut self.fast else { return };
        if let Err(error) = fast.beat() {
            warn!("{error}");
        }
        let before = fast.state().attached.clone();
        let observed = fast.observe_attachments(&snapshot.state.links, &filters);
        // A device that went away or was renamed took its programs along: that is an event of its own.
        let lost: Vec<String> = before
            .difference(&fast.state().attached)
            .filter(|lost| nix::net::if_::if_nametoindex(lost.device.as_str()).is_ok_and(|now| now == lost.ifindex))
            .map(ToString::to_string)
            .collect();
        if !lost.is_empty() {
            warn!("another program has detached {}; attaching again", lost.join(", "));
            self.instruments.repair();
        }
        let unpinned = !self.loader.loads_programs() && !fast.maps_pinned();
        let gates = gates::Gates::look(&self.config, &snapshot.state, self.tables.numbers()).await;
        let observed = observed.is_ok();
        let Some(snapshot) = self.snapshot.take() else { return };
        let xdp_changed = self.look_for_xdp(&snapshot.state).await;
        self.ask_for_gateways(self.desired.as_ref(), &snapshot.state).await;
        self.snapshot = Some(snapshot);
        if !observed || !lost.is_empty() || unpinned || gates != self.gates || xdp_changed {
            // The devices anew: a number that an exit is entered with again may be another device's by now.
            self.reconcile(Kinds::LINKS).await;
        }
    }

    /// Removes everything that any daemon with these directories has made.
    async fn down(mut self, inbox: &mut Inbox) -> anyhow::Result<()> {
        self.supervisor.stop().await;
        self.stop_loading(inbox).await;
        clean(&self.kernel, self.fast.take(), &self.options.instance).await?;
        Instance::forget(&self.options.runtime_dir);
        info!("everything is removed");
        Ok(())
    }
}

const fn config_wants_no_fast_path(config: &Config) -> bool {
    matches!(config.datapath, Datapath::Kernel)
}

/// Returns true if no program is needed, MSS clamps included.
fn wants_no_programs(config: &Config) -> bool {
    config_wants_no_fast_path(config) && !config.clamps()
}

/// Can the tunnels' commands reach their peers, as far as can be seen? An uplink is up and has an address, which gives it
/// a route. At boot they would otherwise use up their start limit before the network is there.
fn online(config: &Config, kernel: &KernelState) -> bool {
    let routed =
        |link: &Link| kernel.main.iter().any(|route| route.oif == Some(link.index) && !is_link_local(&route.dst));
    let uplinks = &config.interfaces.uplink;
    uplinks.is_empty() || matching(uplinks, kernel).any(|link| link.up && routed(link))
}
