//! The keys of the configuration: one table, by which the parser refuses what is unknown, and from which the manual page
//! and the JSON Schema are made.

/// A key that a table may have.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// A line with it, or a table's header.
    pub example: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// Whether the table must have it.
    pub required: Required,
    /// What holds without it, as it would be written.
    pub default: Option<&'static str>,
    /// What it is for, in whole sentences.
    pub doc: &'static str,
}

/// Whether a table must have a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Required {
    /// It may be left out.
    No,
    /// In any case.
    Yes,
    /// Unless it has this other key.
    Unless(&'static str),
}

/// What a key takes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `true` or `false`.
    Flag,
    /// A whole number in this range.
    Number(u32, u32),
    /// This word, or a whole number in this range.
    WordOrNumber(&'static str, u32, u32),
    /// A number and its unit: `"500ms"`, `"60s"`.
    Duration,
    /// One of these words, each with what it means.
    Choice(&'static [(&'static str, &'static str)]),
    /// A string; what stands in it.
    Text(&'static str),
    /// A string or a list of strings; what stands in each.
    Texts(&'static str),
    /// A program and its arguments.
    Command,
    /// A table.
    Table(&'static [Key]),
    /// A table or a list of tables.
    OneOrMore(&'static [Key]),
    /// A list of tables.
    Tables(&'static [Key]),
    /// A table of tables; what their names are.
    Named(&'static str, &'static [Key]),
}

/// A key without a default that may be left out.
const fn key(name: &'static str, example: &'static str, kind: Kind, doc: &'static str) -> Key {
    Key { name, example, kind, required: Required::No, default: None, doc }
}

impl Key {
    const fn required(self) -> Self {
        Self { required: Required::Yes, ..self }
    }

    const fn unless(self, other: &'static str) -> Self {
        Self { required: Required::Unless(other), ..self }
    }

    const fn or(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }
}

/// The file's top level.
pub const TOP: &[Key] = &[
    key("datapath", "datapath = \"both\"", Kind::Choice(DATAPATHS), "Which datapath carries the traffic.")
        .or("\"both\""),
    key(
        "band",
        "band = 20000",
        Kind::Number(3, u32::MAX - 128),
        "The first priority of the policies' rules. There are 129, one for each prefix length, the longest prefix first. \
         The priority before them is that of the probes, and the one before that is for the local table, where the host's \
         own rule for it stands behind the band.",
    )
    .or("20000"),
    key(
        "tree-above",
        "tree-above = 32",
        Kind::Number(0, u32::MAX),
        "With more prefixes of a family than this, its rules are a tree of `goto` rules, which the kernel need not walk one \
         by one. They have priorities behind the 129 of the band, before the next rule of another program, 8192 at most.",
    )
    .or("32"),
    key(
        "bypass-netfilter",
        "bypass-netfilter = true",
        Kind::Flag,
        "Attach the programs although netfilter has rules for forwarded traffic, which then no longer see the packets.",
    )
    .or("false"),
    key(
        "unmatched",
        "unmatched = \"fast\"",
        Kind::Choice(UNMATCHED),
        "Who forwards unmatched packets, replies that come in by the tunnels included. The rules make the \
         kernel slower for these, too.",
    )
    .or("\"kernel\""),
    key(
        "xdp",
        "xdp = \"off\"",
        Kind::Choice(XDP),
        "Whether packets are decided as XDP, before the kernel has made an skb of them, where the ingress device and the \
         tunnel can: never by a generic program. \"on\" takes veth devices along whose other end is in another namespace; \
         its offloads must be off then.",
    )
    .or("\"auto\""),
    key(
        "metrics",
        "metrics = \"127.0.0.1:9942\"",
        Kind::Text("an address and port, or \"unix:\" and an absolute path"),
        "Where Prometheus scrapes. Nowhere unless given.",
    ),
    key(
        "interfaces",
        "[interfaces]",
        Kind::Table(INTERFACES),
        "The devices of this host that are no tunnels, by the part they have.",
    ),
    key(
        "tunnel",
        "[tunnel.sixxs0]",
        Kind::Named("the name of the tunnel's device, which need not exist yet", TUNNEL),
        "A tunnel.",
    ),
    key(
        "policy",
        "[[policy]], with two brackets",
        Kind::Tables(POLICY),
        "A set of sources that leave alike. If prefixes of several policies contain an address, the longest decides.",
    ),
];

const DATAPATHS: &[(&str, &str)] = &[
    ("both", "rules and routes, with the eBPF programs ahead of them"),
    ("kernel", "rules and routes only"),
    ("ebpf", "the programs only; rules are installed where a program cannot be"),
    ("shadow", "rules and routes; the programs decide and count beside them, and leave every packet to them"),
];

const UNMATCHED: &[(&str, &str)] = &[
    ("kernel", "the kernel, after it has asked all rules"),
    (
        "fast",
        "the programs, by the main table, on ingress interfaces and tunnels, where nothing else could decide (Linux 6.3)",
    ),
];

const XDP: &[(&str, &str)] = &[
    ("auto", "where it changes nothing but the speed, as far as can be seen"),
    ("on", "also at veth devices whose other end is out of sight: its offloads are off"),
    ("off", "nowhere"),
];

/// `[interfaces]`
pub(super) const INTERFACES: &[Key] = &[
    key(
        "ingress",
        "ingress = [\"lan0\", \"br-*\"]",
        Kind::Texts("a device's name, or the beginning of names and *"),
        "Where forwarded traffic enters.",
    ),
    key(
        "uplink",
        "uplink = [\"net0\"]",
        Kind::Texts("a device's name, or the beginning of names and *"),
        "Where packets of the policies' sources must never leave.",
    ),
];

/// `[tunnel.NAME]`
pub(super) const TUNNEL: &[Key] = &[
    key(
        "table",
        "table = 200",
        Kind::Number(1, u32::MAX),
        "The routing table of the first policy that prefers this tunnel. Without it, tunroute finds a free one and stays \
         with it.",
    ),
    key(
        "via",
        "via = [\"10.9.0.1\", \"fe80::1\"]",
        Kind::Texts("an address"),
        "The gateway behind a tunnel with Ethernet framing: at most one address for each family.",
    ),
    key(
        "up",
        "up = [\"aiccu\", \"start\", \"/etc/aiccu/tunnel0.conf\"]",
        Kind::Command,
        "The command that starts the tunnel. There is no shell. It may stay in the foreground, or end when the tunnel is \
         there.",
    ),
    key(
        "down",
        "down = [\"aiccu\", \"stop\", \"/etc/aiccu/tunnel0.conf\"]",
        Kind::Command,
        "The command that stops the tunnel.",
    ),
    key(
        "start-limit",
        "start-limit = { burst = 4, interval = \"60s\" }",
        Kind::Table(START_LIMIT),
        "How often `up` is started at most, also over restarts of the daemon.",
    ),
    key(
        "mss",
        "mss = \"auto\"",
        Kind::WordOrNumber("auto", 88, 65495),
        "The largest segment size, in bytes, that TCP may tell the other end through this tunnel; larger ones in the SYNs that \
         pass in either direction are lowered to it. \"auto\" is what the tunnel's MTU has room for. It needs eBPF, with every \
         `datapath`.",
    ),
    key(
        "probe",
        "probe = { target = \"2001:db8::1\", interval = \"5s\" }",
        Kind::OneOrMore(PROBE),
        "What is asked through the tunnel to find out whether it carries packets. Of several probes, all of a family must \
         be answered.",
    ),
];

/// `start-limit`
pub(super) const START_LIMIT: &[Key] = &[
    key("burst", "burst = 4", Kind::Number(1, u32::MAX), "At most this many starts in any `interval`.").or("4"),
    key("interval", "interval = \"60s\"", Kind::Duration, "The time in which `burst` starts are allowed.")
        .or("\"60s\""),
];

/// `probe`
pub(super) const PROBE: &[Key] = &[
    key(
        "target",
        "target = \"2001:db8::1\"",
        Kind::Text("an address, or an address and port"),
        "Who is asked: an address by ICMP echo, an address with a port by TCP.",
    )
    .required(),
    key(
        "source",
        "source = \"2001:db8::2\"",
        Kind::Text("an address"),
        "The source address. Without it the kernel chooses one of the tunnel's.",
    ),
    key("interval", "interval = \"5s\"", Kind::Duration, "From one probe to the next, at least 10 ms.").or("\"5s\""),
    key("timeout", "timeout = \"1s\"", Kind::Duration, "How long an answer may take, at most the interval.")
        .or("\"1s\""),
    key(
        "fail",
        "fail = 3",
        Kind::Number(1, u32::MAX),
        "After this many probes in a row without an answer the tunnel counts as down.",
    )
    .or("3"),
    key(
        "rise",
        "rise = 2",
        Kind::Number(1, u32::MAX),
        "After this many answers in a row the tunnel counts as up again.",
    )
    .or("2"),
    key(
        "hold-down",
        "hold-down = \"30s\"",
        Kind::Duration,
        "A tunnel that has gone down stays down for at least this long.",
    )
    .or("\"0s\""),
];

/// `[[policy]]`
pub(super) const POLICY: &[Key] = &[
    key(
        "name",
        "name = \"tunnel0\"",
        Kind::Text("1 to 64 of A-Z a-z 0-9 . _ -"),
        "The policy's name, by which its table and counters are found again.",
    )
    .required(),
    key(
        "table",
        "table = 200",
        Kind::Number(1, u32::MAX),
        "The policy's routing table. Without it, that of the tunnel it prefers, or a free one.",
    ),
    key(
        "from",
        "from = [\"2a02:578:85a0::/48\", \"@lan0\"]",
        Kind::Texts("an address, a prefix, or @ and an interface's name or the beginning of names and *"),
        "The source prefixes. An address without a length is that address alone. \"@lan0\" stands for the networks on the \
         link at that interface and for its own addresses, as they change: never the peer's address of a point-to-point \
         link, and nothing link-local. \"@lan0 in 2001:db8:a::/48\" takes only those in that range. If two policies would \
         get the same prefix so, the one with the longer range has it, else the first; one that has it literally comes \
         before both.",
    )
    .unless("from-file"),
    key(
        "from-file",
        "from-file = \"prefixes.txt\"",
        Kind::Texts("the path of a file, from the configuration's directory on"),
        "More source prefixes, one in each line; `#` begins a comment. The files are read with the configuration: \
         `tunroute reload` reads them again.",
    ),
    key(
        "via",
        "via = [\"sixxs0\", \"wg0\"]",
        Kind::Texts("the name of a tunnel, or \"main\" alone"),
        "The tunnels, in order of preference: the first that is up carries the traffic. \"main\" leaves these sources to \
         the main table, as if there were no policy for them: an exception within a wider policy. Such a policy has neither \
         `on-down` nor `exempt` nor `table`.",
    )
    .required(),
    key(
        "on-down",
        "on-down = \"unreachable\"",
        Kind::Choice(ON_DOWN),
        "What happens to the packets while none of the tunnels is up.",
    )
    .or("\"unreachable\""),
    key(
        "exempt",
        "exempt = [\"connected\", \"10.0.0.0/8\"]",
        Kind::Texts("a prefix, \"connected\" or \"routed\""),
        "Destinations that the policy does not apply to. \"connected\" stands for the networks on the link at ingress \
         interfaces and tunnels, and with `allow-default` also at uplinks; \"routed\" for all destinations of routes in the \
         main table that are longer than a default route and lead to a device that is no uplink, such as networks behind \
         routers inside. Both follow the main table as it changes, and neither ever lets a packet leave by an uplink, but \
         to the uplink's own network.",
    )
    .or("[\"connected\"]"),
    key(
        "allow-default",
        "allow-default = true",
        Kind::Flag,
        "Says that a prefix in `from` as short as 0.0.0.0/0 or ::/0 is meant. The exempt networks that \"connected\" stands \
         for include those on the link at uplinks then, so that this host answers its neighbours there.",
    )
    .or("false"),
];

const ON_DOWN: &[(&str, &str)] = &[
    ("unreachable", "they are dropped, with an ICMP error"),
    ("blackhole", "they are dropped silently"),
    ("prohibit", "they are dropped, with the ICMP error `administratively prohibited`"),
    ("next", "as if the policy were not there: the next shorter prefix decides, and then the main table"),
];
