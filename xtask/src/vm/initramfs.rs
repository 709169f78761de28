//! The guest's root file system: kernel modules and programs of this machine, and the tests.
//!
//! The kernel unpacks one cpio archive after the other: the first, which is the same every time, is kept.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::kernel::Kernel;
use crate::command::{find_program, output_of, run, say};

/// What a guest's devices and tests need, where it is not built in.
const MODULES: [&str; 22] = [
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "sit",
    "ip6_tunnel",
    "ip_gre",
    "ip6_gre",
    "ipip",
    "wireguard",
    "vrf",
    "dummy",
    "veth",
    "vxlan",
    "tun",
    "bridge",
    "8021q",
    "cls_bpf",
    "cls_u32",
    "cls_matchall",
    "sch_ingress",
    "nf_tables",
    "xfrm_user",
];

/// The programs that tests call. busybox stands in for all others.
const PROGRAMS: [&str; 10] = ["bash", "busybox", "date", "ip", "tc", "ping", "wg", "kmod", "setpriv", "nsenter"];

const INIT: &str = include_str!("init");

/// The part that has no tests in it.
pub fn base(kernel: &Kernel, dir: &Path) -> Result<PathBuf> {
    let mut recipe = DefaultHasher::new();
    (MODULES, PROGRAMS, INIT).hash(&mut recipe);
    let archive = dir.join(format!("{}-{:016x}.cpio", kernel.release, recipe.finish()));
    if archive.is_file() {
        return Ok(archive);
    }
    say(format_args!("making a root file system for Linux {}", kernel.release));
    let tree = Tree::new(dir.join(format!("{}.tree", kernel.release)))?;
    for name in ["proc", "sys", "dev", "tmp", "run", "root"] {
        fs::create_dir_all(tree.0.join(name))?;
    }
    for program in PROGRAMS {
        tree.program(&find_program(program).with_context(|| format!("{program} is not installed"))?)?;
    }
    for name in ["modprobe", "insmod"] {
        symlink("../bin/kmod", tree.0.join("usr/sbin").join(name))?;
    }
    // Busybox's shell would call its own applets instead of the real programs.
    symlink("bash", tree.0.join("usr/bin/sh"))?;
    for applet in output_of(Command::new("busybox").arg("--list"))?.lines() {
        let [bin, sbin] = ["bin", "sbin"].map(|dir| tree.0.join("usr").join(dir).join(applet));
        if !bin.exists() && !sbin.exists() {
            symlink("busybox", bin)?;
        }
    }
    tree.file("init", INIT.as_bytes(), 0o755)?;

    for module in kernel.modules(&MODULES)? {
        tree.copy(&kernel.root().join(&module), &module)?;
    }
    let modules = Path::new("lib/modules").join(&kernel.release);
    for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        tree.copy(&kernel.root().join(&modules).join(name), &modules.join(name))?;
    }
    run(Command::new("/sbin/depmod").arg("-b").arg(&tree.0).arg(&kernel.release), "see what depmod says above")?;
    tree.pack(&archive)?;
    Ok(archive)
}

/// `base` with a directory `/payload`: these programs, and a script `run`.
pub fn with_payload(base: &Path, programs: &[(String, PathBuf)], run: &str) -> Result<PathBuf> {
    let tree = Tree::new(base.with_extension("tree"))?;
    for (name, path) in programs {
        let inside = Path::new("payload").join(name);
        tree.copy(path, &inside)?;
        strip(&tree.0.join(&inside))?;
        tree.libraries(path)?;
    }
    tree.file("payload/run", run.as_bytes(), 0o644)?;
    let payload = base.with_extension("payload");
    tree.pack(&payload)?;

    let archive = base.with_extension("initramfs");
    let mut whole = File::create(&archive).with_context(|| format!("cannot make {}", archive.display()))?;
    for part in [base, &payload] {
        let mut part = File::open(part).with_context(|| format!("cannot open {}", part.display()))?;
        io::copy(&mut part, &mut whole).with_context(|| format!("cannot write {}", archive.display()))?;
    }
    Ok(archive)
}

/// Nine tenths of a test binary are for debuggers.
fn strip(program: &Path) -> Result<()> {
    run(Command::new("strip").arg("--strip-debug").arg(program), "see what strip says above")
}

/// A directory that is to become an archive, and is gone when dropped.
struct Tree(PathBuf);

impl Tree {
    fn new(path: PathBuf) -> Result<Self> {
        let _ = fs::remove_dir_all(&path);
        // As Debian has them: whatever path a program or library is called by, it is found.
        for name in ["bin", "sbin", "lib", "lib64"] {
            let inside = path.join("usr").join(name);
            fs::create_dir_all(&inside).with_context(|| format!("cannot make {}", inside.display()))?;
            symlink(format!("usr/{name}"), path.join(name)).with_context(|| format!("cannot link {name}"))?;
        }
        Ok(Self(path))
    }

    fn file(&self, name: &str, content: &[u8], mode: u32) -> Result<()> {
        let path = self.0.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).context("cannot set permissions")
    }

    /// Copies what `from` is, or leads to.
    fn copy(&self, from: &Path, inside: &Path) -> Result<()> {
        let to = self.0.join(inside);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        }
        fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
        Ok(())
    }

    /// A program of this machine with its libraries, in the place that it has here.
    fn program(&self, path: &Path) -> Result<()> {
        self.copy(path, path.strip_prefix("/").unwrap_or(path))?;
        self.libraries(path)
    }

    fn libraries(&self, program: &Path) -> Result<()> {
        // It fails on a program that is linked statically.
        let Ok(output) = output_of(Command::new("ldd").arg(program)) else { return Ok(()) };
        let words = output.lines().flat_map(str::split_whitespace);
        for library in words.filter(|word| word.starts_with('/')).collect::<BTreeSet<_>>() {
            self.copy(Path::new(library), Path::new(&library[1..]))?;
        }
        Ok(())
    }

    fn pack(&self, archive: &Path) -> Result<()> {
        let partial = archive.with_added_extension("partial");
        let to = File::create(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
        // Not compressed: the guest would take longer than this machine's memory does.
        let script = "set -o pipefail; find . | cpio --quiet --create --format=newc --owner=+0:+0";
        run(Command::new("bash").args(["-c", script]).current_dir(&self.0).stdout(to), "see what cpio says above")?;
        fs::rename(&partial, archive).with_context(|| format!("cannot rename {}", partial.display()))
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
