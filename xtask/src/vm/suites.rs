//! The suites that run in a guest, and what is left out.

/// A suite, and which of its tests run in a guest.
pub struct Suite {
    /// A module of the test binary [`SUITES_BINARY`], or a test binary of its own.
    pub name: &'static str,
    /// Parts of the names of the tests that the smoke test runs; it leaves out a suite that has none.
    pub smoke: Option<&'static [&'static str]>,
    /// Tests that cannot be run there, by a part of their names, and why.
    pub skip: &'static [(&'static str, &'static str)],
    /// Variables for an emulated machine: fewer random cases.
    pub emulated: &'static [(&'static str, &'static str)],
}

/// The test binary with most suites, each a module.
const SUITES_BINARY: &str = "suites";
/// The suites that are binaries of their own.
const ALONE: [&str; 3] = ["tunnels", "datapath", "kernel"];

impl Suite {
    /// The test binary that it is in.
    pub fn binary(&self) -> &'static str {
        if ALONE.contains(&self.name) { self.name } else { SUITES_BINARY }
    }

    /// How the names of its tests begin.
    pub fn prefix(&self) -> String {
        if self.binary() == self.name { String::new() } else { format!("{}::", self.name) }
    }

    const fn whole(name: &'static str) -> Self {
        Self { name, smoke: None, skip: &[], emulated: &[] }
    }

    const fn smoke(self, tests: &'static [&'static str]) -> Self {
        Self { smoke: Some(tests), ..self }
    }

    const fn without(self, skip: &'static [(&'static str, &'static str)]) -> Self {
        Self { skip, ..self }
    }
}

/// All of them, the longest first. Not here: `failover` and `survival` are about milliseconds, `lab` is about the lab, `demo`,
/// `planning`, `operator`, `conventions` and `top` about what a person reads, `metrics` and `prometheus` about what a program
/// does, `import` about files, `service` and `dist` about an installed system, `pipeline` and `tree` about plans.
pub const SUITES: [Suite; 17] = [
    Suite::whole("faults").without(&[("the_clock_jumps", "it takes a C compiler")]),
    Suite::whole("semantics"),
    Suite::whole("lifecycle"),
    Suite::whole("probes"),
    Suite::whole("tunnels").smoke(&["enters_by"]),
    Suite::whole("matrix"),
    Suite::whole("datapath").smoke(&["the_verifier"]),
    Suite::whole("kernel").without(&[
        ("iptables_legacy", "Debian's kernel has ip_tables as a module that is not taken along"),
        ("a_probe_takes_no_time", "it measures time"),
    ]),
    Suite::whole("commands"),
    Suite { emulated: &[("TUNROUTE_HOSTS", "20"), ("TUNROUTE_PACKETS", "100")], ..Suite::whole("equivalence") },
    Suite::whole("explain"),
    Suite::whole("gates"),
    Suite::whole("following"),
    Suite::whole("mss"),
    Suite::whole("trace"),
    Suite::whole("unmatched"),
    Suite::whole("xdp"),
];
