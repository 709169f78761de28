//! The virtual machine: boots a kernel under qemu and listens to what the guest says.

use std::{
    fmt,
    fs::{self, OpenOptions},
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::kernel::Kernel;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// qemu. Several processors of the guest on several threads crash it in early boot now and then.
    Emulation,
}

impl Accelerator {
    /// KVM where a guest has come up under it in reasonable time: on virtual machines it may open, and then hang.
    pub fn choose(kernel: &Kernel, initramfs: &Path, console: &Path) -> Self {
        let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        let limit = Duration::from_secs(15);
        if usable && boot(Self::Kvm, kernel, initramfs, console, limit, |_| {}).is_ok() {
            Self::Kvm
        } else {
            Self::Emulation
        }
    }

    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm"],
            // The guest's time is counted in its instructions, 2 ns each, and leaps over what it would sleep: waiting costs
            // nothing, and whatever else keeps this machine busy, the guest does not notice.
            Self::Emulation => &["-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off"],
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Emulation => "emulated: ten times slower, or more",
        })
    }
}

/// So much of the console is shown when a guest ends without a word.
const CONSOLE_LINES: usize = 25;
/// What the guest says when it has nothing more to say.
const DONE: &str = "vm: done";

/// Boots, and calls `on_line` with each line that the guest prints.
///
/// # Errors
/// qemu cannot be started; the guest is not done within `limit`, or ends before: the error has the end of its console.
pub fn boot(
    accelerator: Accelerator,
    kernel: &Kernel,
    initramfs: &Path,
    console: &Path,
    limit: Duration,
    mut on_line: impl FnMut(&str),
) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut machine = Machine(qemu(accelerator, kernel, initramfs, console).spawn().context("cannot start qemu")?);
    let output = machine.0.stdout.take().context("qemu has no output")?;
    let (lines, received) = mpsc::channel();
    // Ends with the machine.
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    loop {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if line == DONE => return Ok(()),
            Ok(line) => on_line(&line),
            Err(RecvTimeoutError::Timeout) => {
                bail!("Linux {} is not done after {limit:.0?}; its console:\n{}", kernel.release, tail(console))
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("Linux {} has ended before its time; its console:\n{}", kernel.release, tail(console))
            }
        }
    }
}

fn qemu(accelerator: Accelerator, kernel: &Kernel, initramfs: &Path, console: &Path) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(accelerator.options()).args(["-cpu", "max", "-machine", "q35", "-smp", "1", "-m", "1024"]);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot"]);
    qemu.arg("-kernel").arg(kernel.image()).arg("-initrd").arg(initramfs);
    // Without randomized addresses, what qemu has translated of a program serves it when it is started again: all of it
    // takes 0.56 of the time.
    let options = "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic no_timer_check net.ifnames=0 mitigations=off \
                   norandmaps rdinit=/init";
    qemu.args(["-append", options]);
    let console = format!("file,id=console,path={}", console.display());
    qemu.args(["-chardev", &console, "-serial", "chardev:console"]);
    qemu.args(["-chardev", "file,id=out,path=/dev/stdout", "-device", "virtio-serial-pci"]);
    qemu.args(["-device", "virtserialport,chardev=out,name=out", "-device", "virtio-rng-pci"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    if accelerator == Accelerator::Kvm {
        // What it says where KVM does not work is no news.
        qemu.stderr(Stdio::null());
    }
    qemu
}

fn tail(console: &Path) -> String {
    let bytes = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}

/// A running qemu, which does not outlive this value.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
