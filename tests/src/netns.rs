//! A network namespace: run closures and programs in it, configure it with `ip`.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    os::{linux::fs::MetadataExt, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::signal::{SigHandler, Signal, kill, signal},
    unistd::Pid,
};

use crate::{
    lab::{Lab, NETNS_DIR, remove_netns},
    pace::{SOON, patience, until},
};

/// Sysctls of every namespace, below `/proc/sys/net`: addresses are usable at once and survive a link that goes down,
/// nothing is filtered by its reverse path, no router is asked, and ICMP errors are not held back.
const SYSCTLS: &[(&str, &str)] = &[
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
    ("ipv6/conf/all/keep_addr_on_down", "1"),
    ("ipv6/conf/default/keep_addr_on_down", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/icmp_ratelimit", "0"),
    ("ipv6/icmp/ratelimit", "0"),
];

/// A named network namespace. Dropping it kills every process in it and removes the name.
#[derive(Debug)]
pub struct Netns {
    name: String,
    label: String,
    dir: PathBuf,
    // Shared with commands not started yet, which may outlive this value.
    handle: Arc<File>,
}

impl Netns {
    pub(crate) fn create(lab: &Lab, labels: &[&str]) -> Result<Vec<Self>> {
        let name = |label: &str| format!("{}-{label}", lab.id());
        let script: String = labels.iter().map(|label| format!("netns add {}\n", name(label))).collect();
        ip_batch(&[], &script)?;
        let mut made = Vec::new();
        for &label in labels {
            let name = name(label);
            let path = Path::new(NETNS_DIR).join(&name);
            let handle = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            let dir = lab.dir().join(label);
            made.push(Self { name, label: label.to_owned(), dir, handle: Arc::new(handle) });
        }
        for netns in &made {
            fs::create_dir(&netns.dir).with_context(|| format!("cannot make {}", netns.dir.display()))?;
            netns.sysctl(SYSCTLS)?;
            netns.ip("link set lo up")?;
        }
        Ok(made)
    }

    /// The name that `ip -n` takes.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The short name, unique within its lab: `host`, `client`, …
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// A directory of this namespace's own, below the lab's.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The namespace itself, as netlink takes it.
    pub(crate) fn handle(&self) -> &File {
        &self.handle
    }

    /// Runs a closure on a fresh thread in this namespace: sockets that it opens and `/proc/sys/net` belong to it.
    /// A panic in the closure goes on in the caller.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the closure's own error.
    pub fn run_in<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.handle, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", self.name))?;
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A program to be started in this namespace, as `ip netns exec` does it: with a mount namespace of its own in
    /// which `/sys` is of this network namespace. `/sys/fs/bpf` is a bpffs of the process's own and goes with it; see
    /// [`BpfFs`] for pins that shall live longer.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let handle = Arc::clone(&self.handle);
        let enter = move || {
            // What is ignored as it starts, as under `nohup`, a shell cannot trap.
            // SAFETY: no handler of this process's is involved.
            unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl)? };
            Ok(enter(&handle)?)
        };
        // SAFETY: `enter` runs in the forked child and only makes system calls on values that exist already: it
        // neither allocates nor takes locks.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs a program in this namespace to its end and returns what it printed.
    ///
    /// # Errors
    /// It cannot be started or fails; the error has its standard error output.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        output(self.command(program).args(args)).with_context(|| format!("in namespace {}", self.label))
    }

    /// Runs `ip` commands, one a line, without the leading `ip`: `ns.ip("-6 route add default dev tun0")`.
    ///
    /// # Errors
    /// The first command that fails, with its text.
    pub fn ip(&self, script: &str) -> Result<()> {
        // A batch is of one family: `-4` and `-6` are options of the program, not of the command.
        let commands: Vec<(&str, &str)> = script
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(|line| match line.split_once(' ') {
                Some((family @ ("-4" | "-6"), command)) => (family, command),
                _ => ("", line),
            })
            .collect();
        for batch in commands.chunk_by(|(a, _), (b, _)| a == b) {
            let mut args = vec!["-n", &self.name];
            args.extend(batch.iter().map(|(family, _)| *family).filter(|family| !family.is_empty()).take(1));
            let script: String = batch.iter().map(|(_, command)| format!("{command}\n")).collect();
            ip_batch(&args, &script).with_context(|| format!("in namespace {}", self.label))?;
        }
        Ok(())
    }

    /// What `ip ARGS` or `tc ARGS` says of this namespace.
    ///
    /// # Errors
    /// The program cannot be started or fails.
    pub fn query(&self, program: &str, args: &str) -> Result<String> {
        output(Command::new(program).args(["-n", &self.name]).args(args.split_whitespace()))
            .with_context(|| format!("in namespace {}", self.label))
    }

    /// Sets sysctls: `("ipv4/ip_forward", "1")`, paths below `/proc/sys/net`.
    ///
    /// # Errors
    /// One does not exist or refuses the value.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run_in(|| {
            for (path, value) in settings {
                fs::write(format!("/proc/sys/net/{path}"), value)
                    .with_context(|| format!("cannot set net/{path} to {value}"))?;
            }
            Ok(())
        })
    }

    /// Waits until the IPv6 addresses of a device, or of all, are in use, with their routes in the local table: new ones are
    /// when a work queue has seen to them (`addrconf_dad_work()` in `net/ipv6/addrconf.c`). The devices must be up.
    ///
    /// # Errors
    /// They do not come into use.
    pub fn wait_for_addresses(&self, device: Option<&str>) -> Result<()> {
        until(&format!("the addresses of {} are in use", self.label), || {
            self.run_in(|| {
                // What is the process's own is of its main thread's namespace.
                let read = |table| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                // A host without IPv6 has none.
                let (addresses, routes) =
                    (read("if_inet6").unwrap_or_default(), read("ipv6_route").unwrap_or_default());
                Ok(addresses.lines().filter_map(own_address).all(|(address, owner, tentative)| {
                    device.is_some_and(|device| device != owner)
                        || !tentative && routes.lines().any(|route| is_local(route, address))
                }))
            })
        })
    }

    /// The number of a device in this namespace.
    ///
    /// # Errors
    /// There is no such device.
    pub fn ifindex(&self, device: &str) -> Result<u32> {
        self.run_in(|| {
            nix::net::if_::if_nametoindex(device)
                .with_context(|| format!("no device {device} in namespace {}", self.label))
        })
    }

    /// Kills every process in this namespace and waits until they are gone.
    ///
    /// # Errors
    /// A process does not go.
    pub fn kill_all(&self) -> Result<()> {
        kill_processes_in(&self.handle)
    }
}

/// The address, its device and whether it is not in use yet, from a line of `/proc/net/if_inet6`; none if it is of a kind
/// that nobody has asked for.
fn own_address(line: &str) -> Option<(&str, &str, bool)> {
    /// `IFA_F_TENTATIVE`
    const TENTATIVE: u8 = 0x40;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [address, _, _, scope, flags, device] = fields[..] else { return None };
    let flags = u8::from_str_radix(flags, 16).ok()?;
    matches!(scope, "00" | "20").then_some((address, device, flags & TENTATIVE != 0))
}

/// Does this line of `/proc/net/ipv6_route` say that packets to the address are for this host?
fn is_local(route: &str, address: &str) -> bool {
    /// `RTF_LOCAL`
    const LOCAL: u32 = 0x8000_0000;
    let flags = route.split_whitespace().nth(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
    route.strip_prefix(address).is_some_and(|rest| rest.starts_with(" 80 "))
        && flags.is_some_and(|flags| flags & LOCAL != 0)
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = remove_netns(&Path::new(NETNS_DIR).join(&self.name)) {
            eprintln!("network lab: cannot remove namespace {}: {error:#}", self.name);
        }
    }
}

/// What `ip netns exec` does between fork and exec (`lib/namespace.c` in iproute2), and a bpffs on top.
fn enter(handle: &File) -> nix::Result<()> {
    const NONE: Option<&std::ffi::CStr> = None;
    setns(handle, CloneFlags::CLONE_NEWNET)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(Some(c""), c"/", Some(c"none"), MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)?;
    umount2(c"/sys", MntFlags::MNT_DETACH)?;
    mount(Some(c"sysfs"), c"/sys", Some(c"sysfs"), MsFlags::empty(), NONE)?;
    mount(Some(c"bpffs"), c"/sys/fs/bpf", Some(c"bpf"), MsFlags::empty(), NONE)
}

/// A bpffs that outlives the processes that pin in it. Dropping it unmounts it, and what is pinned in it goes.
#[derive(Debug)]
pub struct BpfFs {
    path: PathBuf,
}

impl BpfFs {
    /// Mounts one on a directory, which is made.
    ///
    /// # Errors
    /// The directory cannot be made, or the mount is refused.
    pub fn mount(path: PathBuf) -> Result<Self> {
        const NONE: Option<&str> = None;
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        mount(Some("bpffs"), &path, Some("bpf"), MsFlags::empty(), NONE)
            .with_context(|| format!("cannot mount a bpffs on {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        // A test may have unmounted it as the fault that it is about.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// The processes whose main thread is in a network namespace.
fn processes_in(netns: &File) -> Result<Vec<Pid>> {
    let of = |meta: &fs::Metadata| (meta.st_dev(), meta.st_ino());
    let wanted = of(&netns.metadata().context("cannot stat a network namespace")?);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process that ended meanwhile, or is a zombie, has none.
        let Ok(meta) = fs::metadata(entry.path().join("ns/net")) else { continue };
        if of(&meta) == wanted && pid.unsigned_abs() != std::process::id() {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

/// Kills every process in a network namespace, and those that they start meanwhile.
pub(crate) fn kill_processes_in(netns: &File) -> Result<()> {
    let deadline = Instant::now() + patience(SOON);
    loop {
        let alive = processes_in(netns)?;
        if alive.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "processes {alive:?} survive SIGKILL");
        for pid in alive {
            // Gone already is as good.
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a command to its end; its standard output, or an error with its standard error.
fn output(command: &mut Command) -> Result<String> {
    let what = || format!("{command:?}").replace('"', "");
    let name = what();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {name}"))?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{name}: {}: {}{out}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(out)
}

/// `ip -batch -` with a script on its standard input.
fn ip_batch(args: &[&str], script: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(args)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start ip: install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        // If `ip` stops at a bad line it closes the pipe; its own message below says more.
        let _ = stdin.write_all(script.as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for ip")?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    // "Command failed -:3" counts lines from 1.
    let line = message
        .rsplit(':')
        .next()
        .and_then(|number| number.trim().parse::<usize>().ok())
        .and_then(|number| script.lines().nth(number.wrapping_sub(1)));
    bail!("ip {}: {}", line.unwrap_or(script).trim(), message.trim())
}
