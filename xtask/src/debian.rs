//! Debian packages that are unpacked, and not installed: nothing of them is started or configured.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::command::{is_installed, is_root, run};

/// Downloads a package and unpacks it; `root` is there when all of it is.
pub fn unpack(package: &str, root: &Path, finish: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    ensure!(is_installed("apt-get"), "{package} comes from Debian's archive: this needs a Debian with apt-get");
    let partial = root.with_added_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let mut download = Command::new("apt-get");
    // apt's own sandbox user could not write here.
    download.args(["download", "-o", "APT::Sandbox::User=root", package]).current_dir(&partial);
    let advice = "see what apt-get says above";
    // Debian's package lists are fetched only where they turn out to be missing or too old.
    if run(&mut download, advice).is_err() {
        ensure!(is_root(), "{package} is not to be had: run `sudo apt-get update` and try again");
        run(Command::new("apt-get").arg("update"), advice)?;
        run(&mut download, advice)?;
    }
    let deb = downloaded(&partial)?;
    run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&partial), "see what dpkg-deb says above")?;
    fs::remove_file(&deb).context("cannot remove the package")?;
    finish(&partial)?;
    fs::rename(&partial, root).with_context(|| format!("cannot rename {}", partial.display()))
}

fn downloaded(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).context("cannot read what was downloaded")?;
    let deb = entries.flatten().map(|entry| entry.path()).find(|path| path.extension().is_some_and(|end| end == "deb"));
    deb.context("apt-get has downloaded no package")
}
