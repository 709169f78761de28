//! The command line.

use std::{net::IpAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::{config::Datapath, control::socket::TrialTime, host::instance::Instance};

/// Route each source prefix through its own tunnel: kernel rules and an eBPF fast path, compiled from one file, that
/// always agree.
#[derive(Debug, Parser)]
#[command(name = "tunroute", version, about, max_term_width = 100)]
pub struct Cli {
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
#[expect(missing_docs, reason = "a doc comment on a flattened field would become help text")]
pub enum Command {
    /// Run the daemon, which keeps rules, routes and the fast path as configured.
    ///
    /// The daemon stays in the foreground and logs to standard error. SIGHUP reloads the configuration. SIGTERM and SIGINT
    /// stop the daemon and leave the datapaths in place, so that a restart loses no packet.
    #[command(after_help = "Example: tunroute run --config /etc/tunroute/tunroute.toml")]
    Run(Run),
    /// Check a configuration file. The exit status is 0 if it is valid, 1 if not.
    ///
    /// All errors are shown at once. A warning shows something that is allowed but probably a mistake.
    #[command(after_help = "Example: tunroute check /etc/tunroute/tunroute.toml")]
    Check {
        /// The configuration file.
        file: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Look for settings of this host that keep a configuration from working, and show their effects and fixes.
    ///
    /// The exit status is 0 if nothing is found, 2 if something is, and 1 if the host cannot be examined.
    #[command(after_help = "Example: tunroute doctor --fix")]
    Doctor {
        /// The configuration file.
        #[arg(default_value = "/etc/tunroute/tunroute.toml")]
        file: PathBuf,
        /// Make the kernel settings that fix a finding. They last until the next boot.
        #[arg(long)]
        fix: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a configuration that does what rules and routes made by hand do now.
    ///
    /// The configuration goes to standard output. Comments in it name each rule and route that has no place in it or was not
    /// understood, and the commands that remove what was made by hand. Nothing is changed.
    #[command(after_help = "Example: tunroute import > new.toml && tunroute plan new.toml")]
    Import {
        /// Read these files instead of the rules and routes in force: shell scripts, batch files of `ip`, rt_tables, and
        /// the files of ifupdown, wg-quick (named after the device), systemd-networkd and RHEL (rule-DEV, route-DEV).
        #[arg(long, value_name = "FILE", num_args = 1..)]
        from_script: Vec<PathBuf>,
    },
    /// Show tunnels, policies and counters of the running daemon.
    #[command(after_help = "Example: tunroute status --json | jq .policies")]
    Status {
        #[command(flatten)]
        runtime: RuntimeDir,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// Repeat every second, or every SECONDS, until interrupted. With --json, each status is one line.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
              value_parser = clap::value_parser!(u64).range(1..=3600))]
        watch: Option<u64>,
    },
    /// Watch the running daemon: packets and bytes per second, outcomes, probes and events.
    ///
    /// The view fills the terminal. q, Esc or Ctrl-C ends it.
    #[command(after_help = "Example: tunroute top --interval 2")]
    Top {
        #[command(flatten)]
        runtime: RuntimeDir,
        /// The time between two updates.
        #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
        interval: u64,
    },
    /// Show what a reload or the first start would change.
    ///
    /// The exit status is 0 if nothing would change, 2 if something would, and 1 if there is no plan.
    #[command(after_help = "Example: tunroute plan /etc/tunroute/new.toml")]
    Plan(Plan),
    /// Ask both datapaths what they would do with a packet, and compare them with the configuration.
    ///
    /// The loaded programs are asked by a test run, the kernel by a route lookup; nothing is sent, and no counter moves.
    /// Exit status 0 if both do as configured, 1 if not, 2 if they could not be asked, 77 if you may not ask.
    #[command(after_help = "Example: tunroute explain 2a02:578:85a0::7 2001:db8::1 --iif lan0")]
    Explain {
        /// The packet's source address.
        source: IpAddr,
        /// Its destination address.
        destination: IpAddr,
        /// The device that it enters by [default: the first ingress device; for the host's own addresses, none].
        #[arg(long, value_name = "DEV")]
        iif: Option<String>,
        #[command(flatten)]
        runtime: RuntimeDir,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Compare both datapaths with the configuration on every prefix of the loaded policies.
    ///
    /// Packets from the first and the last address of each prefix, from those before and after it, and from random ones
    /// inside, to random and to exempt destinations. Nothing is sent, and no counter moves. Exit status 0 if both
    /// do as configured for all of them, 1 if not, 2 if they could not be asked, 77 if you may not ask.
    #[command(after_help = "Example: tunroute verify --samples 100")]
    Verify {
        /// Number of random addresses of each prefix.
        #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(..=10_000))]
        samples: u32,
        #[command(flatten)]
        runtime: RuntimeDir,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what the programs decide, packet by packet, until interrupted.
    ///
    /// Only packets from sources of policies are shown. Without a running `trace` it costs nothing.
    #[command(after_help = "Example: tunroute trace --from 2a02:578:85a0::/48 --to 2001:db8::1")]
    Trace {
        /// Only packets from this prefix or address.
        #[arg(long, value_name = "PREFIX", value_parser = prefix)]
        from: Option<IpNet>,
        /// Only packets to this prefix or address.
        #[arg(long, value_name = "PREFIX", value_parser = prefix)]
        to: Option<IpNet>,
        /// The most packets shown per second and processor; the number of others is shown.
        #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
        rate: u32,
        #[command(flatten)]
        runtime: RuntimeDir,
        /// As JSON, one object on each line.
        #[arg(long)]
        json: bool,
    },
    /// Make the running daemon load its configuration again: in full or, if there is an error, not at all.
    ///
    /// It also fails if a part of it is not in force because of a problem that existed before; the rest is.
    #[command(after_help = "Example: tunroute check /etc/tunroute/tunroute.toml && tunroute reload")]
    Reload {
        #[command(flatten)]
        runtime: RuntimeDir,
    },
    /// As `reload`; with `--confirm`, on trial: the earlier configuration comes back unless it is confirmed in time.
    ///
    /// If you lock yourself out, the earlier configuration comes back. On a terminal, Enter confirms; elsewhere, and from
    /// another connection, `tunroute confirm` does.
    #[command(after_help = "Example: tunroute plan; tunroute apply --confirm 60s")]
    Apply {
        #[command(flatten)]
        runtime: RuntimeDir,
        /// How long the trial lasts: 60s, 5m.
        #[arg(long, value_name = "TIME", value_parser = trial)]
        confirm: Option<TrialTime>,
    },
    /// Keep the configuration that is on trial by `apply --confirm`.
    #[command(after_help = "Example: tunroute confirm")]
    Confirm {
        #[command(flatten)]
        runtime: RuntimeDir,
    },
    /// Run a tunnel's `up` command again after the daemon has given up. Its start limit still applies.
    #[command(after_help = "Example: tunroute start sixxs0")]
    Start {
        /// The tunnel's name.
        tunnel: String,
        #[command(flatten)]
        runtime: RuntimeDir,
    },
    /// Stop the daemon, if it is running, and remove everything it has made.
    #[command(after_help = "Example: tunroute down")]
    Down {
        #[command(flatten)]
        runtime: RuntimeDir,
    },
}

fn trial(text: &str) -> Result<TrialTime, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    TrialTime::try_from(time.as_secs()).map_err(str::to_owned)
}

/// The option for the runtime directory.
#[derive(Debug, Args)]
pub struct RuntimeDir {
    /// The daemon's runtime directory, with its control socket.
    #[arg(long, value_name = "DIR", default_value = "/run/tunroute")]
    pub runtime_dir: PathBuf,
}

/// The options for what outlives the daemon.
#[derive(Debug, Args)]
pub struct Directories {
    /// The directory of the daemon's state: allocated tables, start histories.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tunroute")]
    pub state_dir: PathBuf,
    /// The directory of pinned maps and programs, on a bpf file system.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/tunroute")]
    pub pin_dir: PathBuf,
    /// The directory in which iproute2 finds the names of routing tables.
    #[arg(long, value_name = "DIR", default_value = "/etc/iproute2/rt_tables.d")]
    pub rt_tables_dir: PathBuf,
}

impl From<Directories> for Instance {
    fn from(Directories { state_dir, pin_dir, rt_tables_dir }: Directories) -> Self {
        Self { state_dir, pin_dir, rt_tables_dir }
    }
}

/// `tunroute plan`
#[derive(Debug, Args)]
#[expect(missing_docs, reason = "a doc comment on a flattened field would become help text")]
pub struct Plan {
    /// The configuration file [default: the running daemon's, or /etc/tunroute/tunroute.toml without a daemon].
    pub file: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub runtime: RuntimeDir,
    #[command(flatten)]
    pub directories: Directories,
}

/// `tunroute run`
#[derive(Debug, Args)]
#[expect(missing_docs, reason = "a doc comment on a flattened field would become help text")]
pub struct Run {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    #[command(flatten)]
    pub runtime: RuntimeDir,
    #[command(flatten)]
    pub directories: Directories,
    /// Use this datapath instead of the configured one.
    #[arg(long)]
    pub datapath: Option<DatapathArg>,
    /// Attach by clsact filters, as on kernels before 6.6, or by TCX links. Without it, TCX where the kernel has it.
    #[arg(long, hide = true)]
    pub attach: Option<AttachArg>,
    /// Remove everything at exit, as `tunroute down` does.
    #[arg(long)]
    pub down_on_exit: bool,
}

/// `--datapath`
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DatapathArg {
    /// Rules and tables, with the fast path ahead of them.
    Both,
    /// Rules and tables only.
    Kernel,
    /// The eBPF programs only.
    Ebpf,
    /// Rules and tables; the eBPF programs only observe and count.
    Shadow,
}

impl From<DatapathArg> for Datapath {
    fn from(argument: DatapathArg) -> Self {
        match argument {
            DatapathArg::Both => Self::Both,
            DatapathArg::Kernel => Self::Kernel,
            DatapathArg::Ebpf => Self::Ebpf,
            DatapathArg::Shadow => Self::Shadow,
        }
    }
}

/// `--attach`
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum AttachArg {
    /// TCX links.
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

/// A prefix, or an address for the prefix of that address alone.
fn prefix(text: &str) -> Result<IpNet, String> {
    let parsed = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    let prefix = parsed.map_err(|_| "write a prefix such as 2a02:578:85a0::/48, or an address".to_owned())?;
    Ok(prefix.trunc())
}
