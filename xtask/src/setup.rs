//! Installs what building and testing needs. Each step looks first, and says one line when it does something.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail, ensure};

use crate::{
    command::{cargo, is_installed, is_root, output_of, run, say, workspace},
    debian,
};

/// Its LLVM must be that of the compiler pinned in rust-toolchain.toml: change the two together.
const BPF_LINKER: &str = "0.10.3";

const CARGO_FUZZ: &str = "0.13.2";

/// The programs that the network lab and the demo start, and the Debian packages that have them.
const FOR_LABS: &[(&str, &str)] = &[("ip", "iproute2"), ("ping", "iputils-ping")];
/// Those that the tests start besides.
const FOR_TESTS: &[(&str, &str)] = &[("tmux", "tmux"), ("pkill", "procps"), ("dpkg-deb", "dpkg")];
/// Those that the bench starts.
const FOR_BENCH: &[(&str, &str)] = &[("ip", "iproute2"), ("nft", "nftables")];

/// What booting other kernels takes, besides.
const FOR_VIRTUAL_MACHINES: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),
    ("modprobe", "kmod"),
    ("busybox", "busybox-static"),
    ("wg", "wireguard-tools"),
    ("setpriv", "util-linux"),
    ("strip", "binutils"),
];

/// What makes a Debian package.
const FOR_PACKAGING: &[(&str, &str)] =
    &[("dpkg-deb", "dpkg"), ("dpkg-shlibdeps", "dpkg-dev"), ("strip", "binutils"), ("gzip", "gzip")];
/// What makes a clean Debian to install it in.
const FOR_CLEAN_ROOTS: &[(&str, &str)] = &[("debootstrap", "debootstrap"), ("tar", "tar"), ("chroot", "coreutils")];

/// All steps.
pub fn everything() -> Result<()> {
    for_building()?;
    for_testing()?;
    for_measuring()?;
    say("what building, testing and measuring needs is installed");
    Ok(())
}

/// What the eBPF part of the build needs.
pub fn for_building() -> Result<()> {
    rust_src()?;
    bpf_linker()
}

/// What the demo starts.
pub fn for_labs() -> Result<()> {
    install(FOR_LABS)
}

/// What the tests start; returns where Prometheus is.
pub fn for_testing() -> Result<PathBuf> {
    for_labs()?;
    install(FOR_TESTS)?;
    // The bench's contestants are tested, too.
    for_measuring()?;
    prometheus()
}

/// Debian's package would start a server and make a user: it is unpacked, and not installed.
fn prometheus() -> Result<PathBuf> {
    let root = workspace()?.join("target/prometheus");
    if !root.is_dir() {
        say("downloading Prometheus into target/prometheus");
        debian::unpack("prometheus", &root, |_| Ok(()))?;
    }
    Ok(root.join("usr/bin"))
}

/// What `cargo xtask test --vm` starts, and what it takes along into the guests.
pub fn for_virtual_machines() -> Result<()> {
    for_labs()?;
    install(FOR_VIRTUAL_MACHINES)
}

/// What `cargo xtask dist` starts.
pub fn for_packaging() -> Result<()> {
    install(FOR_PACKAGING)
}

/// What `cargo xtask test --dist` starts besides.
pub fn for_clean_roots() -> Result<()> {
    install(FOR_CLEAN_ROOTS)
}

/// What the bench starts.
pub fn for_measuring() -> Result<()> {
    install(FOR_BENCH)
}

fn install(programs: &[(&str, &'static str)]) -> Result<()> {
    let packages = packages_without(programs, is_installed);
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    ensure!(is_installed("apt-get"), "not installed: {names} (these are Debian's names): install them and try again");
    ensure!(is_root(), "not installed: {names}: run `sudo apt-get install {names}` and try again");

    say(format_args!("installing {names}"));
    let mut install = Command::new("apt-get");
    install.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "--yes", "--no-install-recommends"]);
    install.args(packages);
    let advice = "see what apt-get says above";
    // Debian's package lists are fetched only where they turn out to be missing or too old.
    if run(&mut install, advice).is_err() {
        run(Command::new("apt-get").arg("update"), advice)?;
        run(&mut install, advice)?;
    }
    Ok(())
}

fn packages_without(programs: &[(&str, &'static str)], is_installed: impl Fn(&str) -> bool) -> Vec<&'static str> {
    programs.iter().filter(|(program, _)| !is_installed(program)).map(|(_, package)| *package).collect()
}

/// The source of `core`, which is compiled anew for eBPF.
fn rust_src() -> Result<()> {
    let sysroot = output_of(Command::new("rustc").args(["--print", "sysroot"]))?;
    if Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust/library/Cargo.lock").is_file() {
        return Ok(());
    }
    let Ok(toolchain) = env::var("RUSTUP_TOOLCHAIN") else {
        bail!(
            "the Rust component rust-src is not installed, and this cargo was not started by rustup: install the \
             source of this Rust into {}, or use the Rust of https://rustup.rs",
            sysroot.trim_end()
        );
    };
    say(format_args!("installing the Rust component rust-src for {toolchain}"));
    run(
        Command::new("rustup").args(["component", "add", "rust-src", "--toolchain", &toolchain]),
        "see what rustup says above",
    )
}

/// The linker for eBPF.
fn bpf_linker() -> Result<()> {
    tool("bpf-linker", BPF_LINKER).map(drop)
}

/// What `cargo xtask test --fuzz` starts; returns where it is.
pub fn for_fuzzing() -> Result<PathBuf> {
    tool("cargo-fuzz", CARGO_FUZZ)
}

/// A program from crates.io. It goes into the workspace, so that this version is used and no other. Returns its directory.
fn tool(name: &str, wanted: &str) -> Result<PathBuf> {
    let tools = workspace()?.join("target/tools");
    let programs = tools.join("bin");
    let installed = output_of(Command::new(programs.join(name)).arg("--version"));
    if !installed.is_ok_and(|output| version(&output) == Some(wanted)) {
        say(format_args!("installing {name} {wanted} into target/tools (half a minute or more)"));
        // Not optimised: it is built in half of the time, and LLVM, which does the work, is the compiler's.
        let mut install =
            cargo(["install", "--quiet", "--debug", "--locked", "--force", "--version", wanted, "--root"])?;
        install.env("CARGO_PROFILE_DEV_DEBUG", "false");
        run(install.arg(tools).arg(name), "see what cargo says above")?;
    }
    Ok(programs)
}

/// The version in the output of `PROGRAM --version`.
fn version(output: &str) -> Option<&str> {
    output.split_whitespace().nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_of_a_program() {
        for (output, expected) in [
            ("bpf-linker 0.10.3\n", Some("0.10.3")),
            ("bpf-linker 0.10.30-dev (LLVM 22)\n", Some("0.10.30-dev")),
            ("bpf-linker", None),
            ("", None),
        ] {
            assert_eq!(version(output), expected, "{output:?}");
        }
    }

    #[test]
    fn asks_only_for_the_packages_of_missing_programs() {
        assert_eq!(packages_without(FOR_LABS, |_| true), Vec::<&str>::new());
        assert_eq!(packages_without(FOR_LABS, |program| program == "ip"), ["iputils-ping"]);
        assert_eq!(packages_without(FOR_LABS, |_| false), ["iproute2", "iputils-ping"]);
    }
}
