//! `tunroute verify`: asks both datapaths about many packets, at the edges of prefixes and inside them, and compares the
//! answers with each other and with the configuration.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{
    commands::explain::{
        Way,
        agreement::Handling,
        examiner::{ExamineError, Examiner, Setting, Sighting, Subject},
        expected::Intent,
    },
    config::Policy,
    datapath::Place,
    kernel::Answer,
    policy::fast::Hook,
    policy::net::{Family, IfIndex, KernelState, MainRoute},
};

/// Maximum number of random addresses of each prefix.
pub const MAX_SAMPLES: u32 = 10_000;
/// Time from a disagreement to its second look: the daemon has followed, or undone, what others changed by then.
pub const SECOND_LOOK: Duration = Duration::from_millis(700);
/// Maximum number of looks at a packet while something is being changed.
const ATTEMPTS: usize = 5;
/// Maximum number of disagreements that are looked at again.
const SUSPECTS: usize = 10_000;
/// Maximum number of disagreements in the report.
const REPORTED: usize = 20;

/// Ordinary unicast destinations.
const ANYWHERE_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(128, 0, 0, 0), 2);
const ANYWHERE_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// A place where packets are asked about.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    /// The hook and the device.
    pub place: Place,
    /// A program runs there.
    pub program: bool,
}

/// Places, sources and destinations of the packets, besides the policies' prefixes.
#[derive(Clone, Debug, Default)]
pub struct Field {
    /// The ingress devices and the uplinks.
    pub spots: Vec<Spot>,
    /// The host's own addresses: no packet enters with one of them as its source.
    pub own: BTreeSet<IpAddr>,
    /// Exempt destinations, of any policy.
    pub exempt: Vec<IpNet>,
}

impl Field {
    /// A packet from this source to somewhere; none if nothing could enter with it, without an ingress device.
    fn subject(&self, source: IpAddr) -> Option<Subject> {
        let hook = if self.own.contains(&source) { Hook::Egress } else { Hook::Ingress };
        let spots = self.spots.iter().filter(|spot| spot.place.hook == hook);
        let Spot { place, program } = *fastrand::choice(spots.collect::<Vec<_>>())?;
        Some(Subject { place, program, source, destination: self.destination(Family::of_addr(&source)) })
    }

    /// Mostly anywhere; sometimes at the edge of what is exempt.
    fn destination(&self, family: Family) -> IpAddr {
        let edge = (fastrand::u8(..4) == 0).then(|| fastrand::choice(&self.exempt)).flatten();
        match edge.filter(|prefix| Family::of(prefix) == family) {
            Some(prefix) if !prefix.addr().is_multicast() => {
                fastrand::choice(around(prefix)).unwrap_or_else(|| inside(prefix))
            }
            _ => inside(&match family {
                Family::V4 => IpNet::V4(ANYWHERE_V4),
                Family::V6 => IpNet::V6(ANYWHERE_V6),
            }),
        }
    }

    /// Any packet.
    #[must_use]
    pub fn any(&self, policies: &[Policy]) -> Option<Subject> {
        let Policy { from, followed, .. } = fastrand::choice(policies)?;
        let index = fastrand::choice(0..from.len().saturating_add(followed.len()))?;
        let prefix = from.get(index).or_else(|| followed.get(index.checked_sub(from.len())?))?;
        let edge = fastrand::bool().then(|| fastrand::choice(around(prefix))).flatten();
        self.subject(edge.unwrap_or_else(|| inside(prefix)))
    }

    /// The packets for one prefix: from its edges on both sides, and from so many addresses inside.
    fn all(&self, prefix: &IpNet, samples: u32) -> impl Iterator<Item = Subject> {
        let sources = around(prefix).into_iter().chain((0..samples).map(|_| inside(prefix)));
        sources.filter_map(|source| self.subject(source))
    }
}

/// The first and the last address of a prefix, and those before and after it.
fn around(prefix: &IpNet) -> Vec<IpAddr> {
    let (first, last) = (number(prefix.network()), number(prefix.broadcast()));
    let top = match prefix {
        IpNet::V4(_) => u128::from(u32::MAX),
        IpNet::V6(_) => u128::MAX,
    };
    let candidates = [first.checked_sub(1), Some(first), Some(last), last.checked_add(1)];
    let mut addresses: Vec<IpAddr> = candidates
        .into_iter()
        .flatten()
        .filter(|candidate| *candidate <= top)
        .filter_map(|candidate| address(Family::of(prefix), candidate))
        .collect();
    addresses.dedup();
    addresses
}

/// A random address of a prefix.
fn inside(prefix: &IpNet) -> IpAddr {
    let chosen = fastrand::u128(number(prefix.network())..=number(prefix.broadcast()));
    address(Family::of(prefix), chosen).unwrap_or_else(|| prefix.addr())
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

fn address(family: Family, number: u128) -> Option<IpAddr> {
    Some(match family {
        Family::V4 => IpAddr::V4(u32::try_from(number).ok()?.into()),
        Family::V6 => IpAddr::V6(number.into()),
    })
}

/// What was asked, and what came of it. The names are those of `--json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// The policies.
    pub policies: usize,
    /// Their source prefixes.
    pub prefixes: usize,
    /// The packets that both datapaths were asked about.
    pub packets: u64,
    /// Those about which one gave no answer.
    pub unanswered: u64,
    /// Why, for the first of them.
    pub unanswered_because: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// How many they disagree about.
    pub disagreeing: u64,
    /// The first of these.
    pub disagreements: Vec<Disagreement>,
    /// The policies that are left to the kernel because of a disagreement, and why.
    pub closed: Vec<String>,
}

/// A packet that they disagree about, twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disagreement {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes to.
    pub destination: IpAddr,
    /// Which program.
    pub hook: Hook,
    /// At which device.
    pub device: String,
    /// What the program does.
    pub program: String,
    /// What the kernel would do.
    pub kernel: String,
    /// In which respect they disagree.
    pub because: String,
    /// The command that explains it.
    pub explain: String,
}

/// Puts names to numbers.
#[derive(Clone, Debug, Default)]
pub struct Names(pub BTreeMap<IfIndex, String>);

impl Names {
    fn of(&self, device: IfIndex) -> String {
        self.0.get(&device).cloned().unwrap_or_else(|| format!("ifindex {device}"))
    }

    /// A disagreement in words.
    #[must_use]
    pub fn describe(&self, subject: &Subject, sighting: &Sighting) -> Disagreement {
        let Subject { place, source, destination, .. } = *subject;
        let way = |device, gateway| format!("leaves {}", Way { device: self.of(device), gateway });
        let device = self.of(place.device);
        let iif = if place.hook == Hook::Ingress { format!(" --iif {device}") } else { String::new() };
        Disagreement {
            source,
            destination,
            hook: place.hook,
            program: match sighting.handling {
                None => "none runs here".to_owned(),
                Some(Handling::Left) => "left to the kernel".to_owned(),
                Some(Handling::Dropped) => "dropped".to_owned(),
                Some(Handling::Leaves { device, gateway }) => way(device, gateway),
            },
            kernel: match sighting.kernel {
                Answer::Leaves { device, gateway, .. } => way(device, gateway),
                Answer::Local { .. } => "for this host".to_owned(),
                Answer::Refused(refused) => refused.to_string(),
            },
            because: sighting.because().to_owned(),
            explain: format!("tunroute explain {source} {destination}{iif}"),
            device,
        }
    }
}

/// What a running verification compares with; the daemon brings it up to date after each pass.
#[derive(Debug, Default)]
pub struct Wanted(RwLock<Arc<Want>>);

/// See [`Setting`].
#[derive(Debug, Default)]
struct Want {
    intent: Arc<Intent>,
    main: Vec<MainRoute>,
    uplinks: BTreeSet<IfIndex>,
    rules: bool,
}

impl Wanted {
    /// Replaces it.
    pub fn set(&self, intent: Arc<Intent>, kernel: &KernelState, uplinks: BTreeSet<IfIndex>, rules: bool) {
        let want = Arc::new(Want { intent, main: kernel.main.clone(), uplinks, rules });
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = want;
    }

    fn get(&self) -> Arc<Want> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Everything that a run needs, apart from the daemon.
pub struct Verifier {
    /// Whose prefixes are walked.
    pub policies: Vec<Policy>,
    /// Random addresses of each prefix.
    pub samples: u32,
    /// Where packets come from and go to.
    pub field: Arc<Field>,
    /// What the answers are compared with.
    pub wanted: Arc<Wanted>,
    /// The devices' names.
    pub names: Names,
    /// Goes up whenever the daemon changes something: answers from before and after do not belong together.
    pub generation: Arc<AtomicU64>,
    /// Both datapaths.
    pub examiner: Examiner,
}

impl Verifier {
    /// Asks both datapaths about everything; returns what came of it, and the packets that they disagree about.
    #[must_use]
    pub fn run(mut self) -> (Verification, Vec<(Subject, Sighting)>) {
        let start = Instant::now();
        let policies = std::mem::take(&mut self.policies);
        let prefixes: Vec<&IpNet> = policies.iter().flat_map(Policy::sources).collect();
        let mut told = Verification {
            policies: policies.len(),
            prefixes: prefixes.len(),
            packets: 0,
            unanswered: 0,
            unanswered_because: None,
            seconds: 0.0,
            disagreeing: 0,
            disagreements: Vec::new(),
            closed: Vec::new(),
        };
        let mut suspects = Vec::new();
        for prefix in prefixes {
            for subject in self.field.all(prefix, self.samples).collect::<Vec<_>>() {
                told.packets += 1;
                match self.look(&subject) {
                    Ok(sighting) if sighting.agree() => {}
                    Ok(_) if suspects.len() < SUSPECTS => suspects.push(subject),
                    Ok(_) => told.disagreeing += 1,
                    Err(error) => {
                        told.unanswered += 1;
                        told.unanswered_because.get_or_insert_with(|| error.to_string());
                    }
                }
            }
        }
        let mut confirmed = Vec::new();
        if !suspects.is_empty() {
            std::thread::sleep(SECOND_LOOK);
        }
        for subject in suspects {
            if let Ok(sighting) = self.look(&subject)
                && !sighting.agree()
            {
                confirmed.push((subject, sighting));
            }
        }
        told.disagreeing += u64::try_from(confirmed.len()).unwrap_or(u64::MAX);
        let described =
            confirmed.iter().take(REPORTED).map(|(subject, sighting)| self.names.describe(subject, sighting));
        told.disagreements = described.collect();
        told.seconds = start.elapsed().as_secs_f64();
        (told, confirmed)
    }

    /// Looks at a packet while nothing is being changed, as far as that can be had.
    fn look(&mut self, subject: &Subject) -> Result<Sighting, ExamineError> {
        for _ in 1..ATTEMPTS {
            let before = self.generation.load(Ordering::Acquire);
            let sighting = self.ask(subject);
            if self.generation.load(Ordering::Acquire) == before || matches!(&sighting, Ok(s) if s.agree()) {
                return sighting;
            }
        }
        self.ask(subject)
    }

    fn ask(&mut self, subject: &Subject) -> Result<Sighting, ExamineError> {
        let want = self.wanted.get();
        let Want { intent, main, uplinks, rules } = &*want;
        let setting = Setting { intent, main, uplinks, names: &self.names.0, rules: *rules };
        self.examiner.look(subject, &setting)
    }
}

impl Verification {
    /// Do both datapaths agree, without one having been closed for it?
    #[must_use]
    pub const fn agree(&self) -> bool {
        self.disagreeing == 0 && self.closed.is_empty()
    }

    /// The verification as a person reads it.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a mean for people")]
    pub fn render(&self, colour: bool) -> String {
        let paint = |text: &str, code: &str| {
            if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
        };
        let Self { policies, prefixes, packets, seconds, disagreeing, .. } = self;
        let mut text = format!(
            "asked both datapaths about {packets} packets,\n\
             from the edges and the insides of {} of {},\n\
             in {seconds:.2} s ({:.0} µs each)\n\n",
            counted(*prefixes, "prefix", "prefixes"),
            counted(*policies, "policy", "policies"),
            seconds * 1e6 / (*packets).max(1) as f64
        );
        // Writing to a string does not fail.
        if self.unanswered > 0 {
            let because = self.unanswered_because.as_deref().unwrap_or_default();
            let _infallible = writeln!(text, "{} could not be asked about: {because}\n", self.unanswered);
        }
        if *disagreeing == 0 {
            let _infallible = writeln!(text, "{} on all of them", paint("they agree", "32"));
        } else {
            let _infallible = writeln!(text, "{} on {disagreeing} of them", paint("they DISAGREE", "1;31"));
        }
        for disagreement in &self.disagreements {
            let Disagreement { because, program, kernel, explain, hook, device, .. } = disagreement;
            let _infallible = write!(
                text,
                "\n  {because}\n    program  {program} ({hook} at {device})\n    kernel   {kernel}\n    {explain}\n"
            );
        }
        let more = disagreeing.saturating_sub(u64::try_from(self.disagreements.len()).unwrap_or(u64::MAX));
        if more > 0 {
            let _infallible = writeln!(text, "\n  and {more} more");
        }
        for closed in &self.closed {
            let _infallible = writeln!(text, "\n{closed}");
        }
        text
    }
}

fn counted(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges() {
        for (prefix, expected) in [
            ("10.1.0.0/16", "10.0.255.255 10.1.0.0 10.1.255.255 10.2.0.0"),
            ("10.0.0.1/32", "10.0.0.0 10.0.0.1 10.0.0.2"),
            ("0.0.0.0/0", "0.0.0.0 255.255.255.255"),
            ("255.255.255.0/24", "255.255.254.255 255.255.255.0 255.255.255.255"),
            (
                "2a02::/32",
                "2a01:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2a02:: 2a02:0:ffff:ffff:ffff:ffff:ffff:ffff 2a02:1::",
            ),
            ("::/0", ":: ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            let prefix: IpNet = prefix.parse().expect("a prefix");
            let expected: Vec<IpAddr> =
                expected.split(' ').map(|address| address.parse().expect("an address")).collect();
            assert_eq!(around(&prefix), expected);
            for _ in 0..20 {
                assert!(prefix.contains(&inside(&prefix)));
            }
        }
    }

    #[test]
    fn own_addresses_start_here_and_others_enter() {
        let spot = |hook, device| Spot { place: Place { xdp: false, hook, device, address: [0; 6] }, program: true };
        let field = Field {
            spots: vec![spot(Hook::Ingress, 2), spot(Hook::Egress, 3)],
            own: ["10.0.0.1".parse().expect("an address")].into(),
            exempt: vec!["192.0.2.0/24".parse().expect("a prefix")],
        };
        let prefix: IpNet = "10.0.0.0/24".parse().expect("a prefix");
        let mut edges = 0;
        for subject in field.all(&prefix, 2000) {
            assert_eq!(subject.place.hook == Hook::Egress, subject.source.to_string() == "10.0.0.1");
            let destination = subject.destination.to_string();
            edges +=
                u32::from(["192.0.1.255", "192.0.2.0", "192.0.2.255", "192.0.3.0"].contains(&destination.as_str()));
        }
        assert!((100..1000).contains(&edges), "{edges}");
        assert!(Field::default().all(&prefix, 3).next().is_none());
    }
}
