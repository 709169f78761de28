//! A clean Debian, of the release that this machine runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::command::{run, say};

/// A directory with a minimal Debian in it; removed when dropped.
pub struct CleanRoot(PathBuf);

impl CleanRoot {
    /// Unpacks one; the first time, it is made from Debian's packages and kept as an archive in `dir`.
    pub fn make(dir: &Path) -> Result<Self> {
        let release = release(&fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?)?;
        let archive = dir.join(format!("root-{release}.tar"));
        let path = dir.join(format!("root-{}", std::process::id()));
        let root = Self(path);
        if archive.is_file() {
            fs::create_dir(root.path()).with_context(|| format!("cannot make {}", root.path().display()))?;
            run(Command::new("tar").arg("-xpf").arg(&archive).arg("-C").arg(root.path()), "see what tar says above")?;
            return Ok(root);
        }
        say(format_args!("making a clean Debian root ({release}; a minute or two)"));
        let mut make = Command::new("debootstrap");
        make.args(["--variant=minbase", "--include=iproute2,iputils-ping", &release]).arg(root.path());
        run(&mut make, "see what debootstrap says above")?;
        let partial = archive.with_added_extension("partial");
        run(
            Command::new("tar").arg("-cf").arg(&partial).arg("-C").arg(root.path()).arg("."),
            "see what tar says above",
        )?;
        fs::rename(&partial, &archive).with_context(|| format!("cannot rename {}", partial.display()))?;
        Ok(root)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Installs a package. What it depends on must be there: a minimal Debian has it.
    pub fn install(&self, package: &Path) -> Result<()> {
        let inside = self.0.join("tmp/tunroute.deb");
        fs::copy(package, &inside).with_context(|| format!("cannot copy {}", package.display()))?;
        let mut install = Command::new("chroot");
        install.arg(&self.0).args(["dpkg", "--install", "/tmp/tunroute.deb"]);
        run(&mut install, "see what dpkg says above")?;
        fs::remove_file(&inside).context("cannot remove the package from the clean root")
    }
}

impl Drop for CleanRoot {
    fn drop(&mut self) {
        // Its mounts belonged to processes that are gone.
        if let Err(error) = fs::remove_dir_all(&self.0) {
            say(format_args!("cannot remove {}: {error}", self.0.display()));
        }
    }
}

/// The release's name in `/etc/os-release`.
fn release(text: &str) -> Result<String> {
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release names no release: this needs Debian")?.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_with_and_without_quotes() {
        for (text, expected) in [
            ("NAME=\"Debian GNU/Linux\"\nVERSION_CODENAME=bookworm\n", Some("bookworm")),
            ("VERSION_CODENAME=\"noble\"\n", Some("noble")),
            ("NAME=Alpine\n", None),
        ] {
            assert_eq!(release(text).ok().as_deref(), expected);
        }
    }
}
