use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const LIMIT: StartLimit = StartLimit { burst: 4, interval: Duration::from_secs(60) };
const PROCESS: ProcessId = ProcessId { pid: 2, start_ticks: 3, output: 4 };

fn machine(record: Record) -> Machine {
    Machine::new(LIMIT, record, false, fastrand::Rng::with_seed(1))
}

/// A machine with a clock, and a world in which every start ends as told.
struct World {
    machine: Machine,
    now: BootTime,
    starts: Vec<BootTime>,
}

impl World {
    fn new() -> Self {
        Self { machine: machine(Record::default()), now: BootTime(1_000_000), starts: Vec::new() }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    /// Takes an event; a start succeeds in running the command.
    fn tell(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.machine.step(self.now, event) {
                if action == Action::Start {
                    self.starts.push(self.now);
                    events.push_back(Event::Spawned(PROCESS));
                }
            }
        }
    }

    /// Goes to the next deadline; returns how far it was.
    fn wait(&mut self) -> Duration {
        let deadline = self.machine.deadline().expect("something is due");
        let time = deadline.since(self.now);
        self.pass(time);
        self.tell(Event::Tick);
        time
    }

    /// Fails every start until the limit gives the tunnel up or the time is over; returns the pauses.
    fn fail_for(&mut self, time: Duration) -> Vec<Duration> {
        let end = self.now.after(time);
        let mut pauses = Vec::new();
        while self.now < end && self.machine.phase() != Phase::GivenUp {
            match self.machine.phase() {
                Phase::Running => self.tell(Event::Ended(End::Failure)),
                _ => pauses.push(self.wait()),
            }
        }
        pauses
    }
}

#[test]
fn nothing_starts_before_the_device_was_looked_at() {
    let mut world = World::new();
    assert_eq!((world.machine.phase(), world.machine.deadline()), (Phase::Idle, None));
    world.tell(Event::Device(true));
    assert_eq!((world.machine.phase(), world.machine.deadline()), (Phase::Idle, None), "up without us");

    let mut world = World::new();
    world.tell(Event::Device(false));
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, 1));
}

#[test]
fn a_starter_is_run_again_only_when_its_device_stays_away() {
    let mut world = World::new();
    world.tell(Event::Device(false));
    world.pass(Duration::from_secs(2));
    world.tell(Event::Ended(End::Success));
    assert_eq!(world.machine.phase(), Phase::Started);
    world.pass(Duration::from_secs(20));
    world.tell(Event::Device(true));
    assert_eq!((world.machine.phase(), world.machine.deadline()), (Phase::Started, None));

    // A flap shorter than the grace is nothing; a longer one is.
    world.pass(Duration::from_secs(3600));
    world.tell(Event::Device(false));
    world.pass(GRACE - Duration::from_secs(1));
    world.tell(Event::Tick);
    world.tell(Event::Device(true));
    assert_eq!((world.machine.deadline(), world.starts.len()), (None, 1));
    world.tell(Event::Device(false));
    assert_eq!(world.wait(), GRACE);
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, 2));
}

#[test]
fn a_running_command_is_left_alone() {
    let mut world = World::new();
    for up in [false, true, false, true, false] {
        world.tell(Event::Device(up));
        world.pass(Duration::from_secs(1000));
        world.tell(Event::Tick);
    }
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, 1));
}

#[test]
fn a_starter_whose_device_never_comes_is_run_ever_more_rarely() {
    let mut world = World::new();
    world.tell(Event::Device(false));
    let mut pauses = Vec::new();
    for _ in 0..12 {
        world.tell(Event::Ended(End::Success));
        pauses.push(world.wait());
        assert_eq!(world.machine.phase(), Phase::Running);
    }
    assert!(pauses[..5].iter().all(|pause| *pause == GRACE), "{pauses:?}");
    assert!(pauses[5..9].is_sorted() && pauses[8..].iter().all(|pause| *pause >= LAST_PAUSE), "{pauses:?}");
}

#[test]
fn the_pause_grows_to_five_minutes_and_recovers() {
    let mut machine = machine(Record::default());
    let pauses: Vec<f64> = (0..200).map(|_| machine.pause().as_secs_f64()).collect();
    assert!((1.0..1.25).contains(&pauses[0]), "{pauses:?}");
    assert!(pauses[..9].is_sorted_by(|a, b| a < b), "{pauses:?}");
    assert!(pauses[9..].iter().all(|pause| (240.0..=300.0).contains(pause)), "{pauses:?}");
    assert!(pauses[9..].windows(2).any(|pair| pair[0] != pair[1]), "chance has a part");

    for (up, recovered) in [(STABLE - Duration::from_secs(1), false), (STABLE, true)] {
        let mut world = World::new();
        world.tell(Event::Device(false));
        world.machine.failures = 7;
        world.tell(Event::Device(true));
        world.pass(up);
        world.tell(Event::Ended(End::Failure));
        assert_eq!(world.machine.phase(), Phase::Backoff);
        assert_eq!(world.machine.failures, if recovered { 1 } else { 8 });
    }
}

#[test]
fn a_failure_is_repeated_though_the_device_is_up() {
    let mut world = World::new();
    world.tell(Event::Device(false));
    world.tell(Event::Device(true));
    world.tell(Event::Ended(End::Failure));
    world.tell(Event::Device(false));
    world.tell(Event::Device(true));
    assert!(world.wait() < Duration::from_secs(2));
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, 2));
}

/// Fails four times at once; then the limit holds the fifth start back.
fn tripped() -> World {
    let mut world = World::new();
    world.tell(Event::Device(false));
    while world.machine.phase() != Phase::Limited {
        match world.machine.phase() {
            Phase::Running => world.tell(Event::Ended(End::Failure)),
            _ => drop(world.wait()),
        }
    }
    world
}

#[test]
fn the_first_trip_waits_for_the_window() {
    let mut world = tripped();
    assert_eq!(world.starts.len(), 4);
    assert_eq!(world.machine.deadline(), Some(world.starts[0].after(Duration::from_millis(60_001))));
    world.wait();
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, 5));
}

#[test]
fn daemons_that_come_and_go_while_it_waits_are_one_trip() {
    let world = tripped();
    let record = world.machine.record().clone();
    for _ in 0..5 {
        let mut machine = machine(record.clone());
        machine.step(world.now, Event::Device(false));
        machine.step(world.now.after(GRACE), Event::Tick);
        assert_eq!(machine.phase(), Phase::Limited);
    }
}

#[test]
fn the_second_trip_gives_up_for_good() {
    let mut world = tripped();
    // It works for a while, so the pauses start anew; then it fails again.
    world.wait();
    world.tell(Event::Device(true));
    world.pass(Duration::from_secs(7200));
    world.tell(Event::Device(false));
    world.fail_for(Duration::from_secs(600));
    assert_eq!((world.machine.phase(), world.machine.deadline()), (Phase::GivenUp, None));
    let starts = world.starts.len();

    // Neither the device nor a new daemon changes that.
    world.machine = machine(world.machine.record().clone().restored(None, world.now, LIMIT));
    for event in [Event::Device(false), Event::Tick, Event::Device(true), Event::Limit(LIMIT), Event::Device(false)] {
        world.tell(event);
        world.pass(Duration::from_secs(100_000));
        world.tell(Event::Tick);
        assert_eq!((world.machine.phase(), world.starts.len()), (Phase::GivenUp, starts), "{event:?}");
    }
    // The operator does.
    world.tell(Event::Reset);
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, starts + 1));
}

#[test]
fn the_operator_does_not_get_past_the_limit() {
    let mut world = tripped();
    world.tell(Event::Reset);
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Limited, 4));
    world.tell(Event::Limit(StartLimit { burst: 5, ..LIMIT }));
    assert_eq!((world.machine.phase(), world.starts.len()), (Phase::Running, 5));
}

#[test]
fn a_tunnel_that_fails_for_a_week_is_not_given_up() {
    let mut world = World::new();
    world.tell(Event::Device(false));
    world.fail_for(Duration::from_secs(7 * 86_400));
    assert!(world.starts.len() > 1900, "{}", world.starts.len());
}

#[test]
fn a_new_daemon_gives_the_last_start_its_grace() {
    let mut world = World::new();
    world.tell(Event::Device(false));
    world.pass(Duration::from_secs(5));
    let record = world.machine.record().clone();

    let mut next = machine(record.clone());
    assert_eq!(next.step(world.now, Event::Device(false)), []);
    assert_eq!(next.deadline(), Some(world.starts[0].after(GRACE)));
    next.step(world.now, Event::Device(true));
    assert_eq!(next.deadline(), None);

    let mut adopting = Machine::new(LIMIT, record, true, fastrand::Rng::with_seed(1));
    assert_eq!(adopting.step(world.now.after(GRACE * 2), Event::Device(false)), []);
    assert_eq!(adopting.phase(), Phase::Running);
}

/// What may happen to a daemon and its tunnel.
#[derive(Clone, Debug)]
enum Fate {
    Device(bool),
    End(bool),
    Pass(u32),
    ToDeadline,
    Reset,
    /// The daemon dies and comes back; so many of the actions of its last step are not done.
    Crash {
        undone: usize,
    },
    Reboot {
        off: u32,
    },
    /// The file is damaged while the daemon is away.
    Damage,
    /// The disk takes or refuses writes, from the next daemon on.
    Disk {
        works: bool,
    },
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        3 => any::<bool>().prop_map(Fate::Device),
        6 => prop::bool::weighted(0.2).prop_map(Fate::End),
        4 => (0..90_000u32).prop_map(Fate::Pass),
        8 => Just(Fate::ToDeadline),
        2 => Just(Fate::Reset),
        4 => (0..3usize).prop_map(|undone| Fate::Crash { undone }),
        1 => (0..90_000u32).prop_map(|off| Fate::Reboot { off }),
        1 => Just(Fate::Damage),
        1 => any::<bool>().prop_map(|works| Fate::Disk { works }),
    ]
}

/// A machine, a disk, a kernel, and a clock that nobody in there can read.
struct Lab {
    limit: StartLimit,
    machine: Machine,
    file: Option<String>,
    disk_works: bool,
    boot: u32,
    booted_at: i64,
    clock: i64,
    starts: Vec<i64>,
}

impl Lab {
    fn new(limit: StartLimit) -> Self {
        let machine = Machine::new(limit, Record::default(), false, fastrand::Rng::with_seed(7));
        Self { limit, machine, file: None, disk_works: true, boot: 0, booted_at: 0, clock: 0, starts: Vec::new() }
    }

    fn now(&self) -> BootTime {
        BootTime(self.clock - self.booted_at)
    }

    fn save(&mut self) {
        if self.disk_works {
            let record = self.machine.record().to_save(Some(&self.boot.to_string()), self.now());
            self.file = Some(serde_json::to_string(&record).unwrap());
        }
    }

    /// A daemon starts, as the driver does it.
    fn boot_daemon(&mut self) {
        let now = self.now();
        let mut record = match self.file.as_deref().map(serde_json::from_str::<Record>) {
            None => Record::default(),
            Some(Ok(record)) => record.restored(Some(&self.boot.to_string()), now, self.limit),
            Some(Err(_)) => Record::unknown(now, self.limit),
        };
        if !self.disk_works {
            record.hold(now, self.limit);
        }
        self.machine = Machine::new(self.limit, record, false, fastrand::Rng::with_seed(self.clock.unsigned_abs()));
        self.save();
    }

    /// Takes an event, but dies before the last `undone` actions of the first step.
    fn tell(&mut self, event: Event, undone: usize) {
        let mut events = VecDeque::from([event]);
        let mut undone = Some(undone);
        while let Some(event) = events.pop_front() {
            let actions = self.machine.step(self.now(), event);
            let done = actions.len().saturating_sub(undone.take().unwrap_or(0));
            for action in &actions[..done] {
                match action {
                    Action::Save => self.save(),
                    Action::Start => {
                        // The disk took a while, now more and now less.
                        self.clock += [700, 3, 90][self.starts.len() % 3];
                        self.starts.push(self.clock);
                        events.push_back(Event::Spawned(PROCESS));
                    }
                }
            }
            if done < actions.len() {
                return self.boot_daemon();
            }
        }
    }

    fn suffer(&mut self, fate: Fate) {
        match fate {
            Fate::Device(up) => self.tell(Event::Device(up), 0),
            Fate::End(success) if self.machine.phase() == Phase::Running => {
                self.tell(Event::Ended(if success { End::Success } else { End::Failure }), 0);
            }
            Fate::End(_) => {}
            Fate::Pass(time) => {
                self.clock += i64::from(time);
                self.tell(Event::Tick, 0);
            }
            Fate::ToDeadline => self.reach_deadline(0),
            Fate::Reset => self.tell(Event::Reset, 0),
            Fate::Crash { undone } => {
                self.reach_deadline(undone);
                self.boot_daemon();
                self.tell(Event::Device(false), 0);
            }
            Fate::Reboot { off } => {
                self.boot += 1;
                self.clock += i64::from(off);
                self.booted_at = self.clock;
                self.boot_daemon();
            }
            Fate::Damage => {
                self.file = Some("{".to_owned());
                self.boot_daemon();
            }
            Fate::Disk { works } => {
                if works && !self.disk_works {
                    // The gap that `record` documents: starts that no disk has seen are forgotten.
                    self.clock += i64::try_from(self.limit.interval.as_millis()).unwrap();
                }
                self.disk_works = works;
                self.boot_daemon();
            }
        }
    }

    fn reach_deadline(&mut self, undone: usize) {
        if let Some(deadline) = self.machine.deadline() {
            self.clock = self.clock.max(self.booted_at + deadline.0);
            self.tell(Event::Tick, undone);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn never_more_than_burst_starts_in_any_interval(
        burst in 1..6u32,
        interval in 1_000..120_000u32,
        fates in prop::collection::vec(fate(), 1..150),
    ) {
        let limit = StartLimit { burst, interval: Duration::from_millis(interval.into()) };
        let mut lab = Lab::new(limit);
        for fate in fates {
            lab.suffer(fate);
        }
        for (index, start) in lab.starts.iter().enumerate() {
            let after = lab.starts[index..].iter().take_while(|next| *next - start <= i64::from(interval)).count();
            prop_assert!(after <= burst as usize, "{} starts within {} ms of {}: {:?}", after, interval, start, lab.starts);
        }
    }
}
