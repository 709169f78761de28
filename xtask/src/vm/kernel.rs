//! Stock Debian kernels: downloaded and unpacked below `target/vm`, never installed.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    command::{is_root, output_of, run, say},
    debian,
};

/// A kernel, unpacked.
pub struct Kernel {
    /// What `uname -r` says: `6.1.0-56-cloud-amd64`.
    pub release: String,
    root: PathBuf,
}

impl Kernel {
    /// The newest kernel of a series such as `6.1` that the machine's Debian offers.
    pub fn fetch(series: &str, dir: &Path) -> Result<Self> {
        let package = match newest(series)? {
            Some(package) => package,
            None => {
                ensure!(
                    is_root(),
                    "no cloud kernel of {series} is known here: run `sudo apt-get update` and try again"
                );
                run(Command::new("apt-get").arg("update"), "see what apt-get says above")?;
                newest(series)?.with_context(|| {
                    format!("Debian's package lists have no linux-image-{series}.*-cloud-amd64: name another series")
                })?
            }
        };
        let release = package.trim_start_matches(PREFIX).to_owned();
        let root = dir.join(&release);
        if !root.is_dir() {
            say(format_args!("downloading {package}"));
            unpack(&package, &root).with_context(|| format!("cannot unpack {package}"))?;
        }
        Ok(Self { release, root })
    }

    /// The compressed kernel, as a boot loader takes it.
    pub fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// The files of these modules and of those that they need, below the kernel's root. What is built in, or not there at
    /// all, has none.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for name in names {
            let mut modprobe = Command::new("/sbin/modprobe");
            modprobe.arg("-d").arg(&self.root).args(["-S", &self.release, "--show-depends", name]);
            let Ok(output) = output_of(&mut modprobe) else { continue };
            let paths = output.lines().filter_map(module_file);
            files.extend(paths.filter_map(|path| Path::new(path).strip_prefix(&self.root).ok()).map(Path::to_owned));
        }
        files.sort();
        files.dedup();
        Ok(files)
    }

    /// Where it was unpacked.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

const PREFIX: &str = "linux-image-";

/// The file in `insmod FILE OPTIONS`.
fn module_file(line: &str) -> Option<&str> {
    let line = line.strip_prefix("insmod ")?;
    let name = line.find(".ko")?;
    let end = line[name..].find(' ').map_or(line.len(), |length| name + length);
    Some(&line[..end])
}

fn newest(series: &str) -> Result<Option<String>> {
    let pattern = format!(r"^{PREFIX}{}\..*-cloud-amd64$", series.replace('.', r"\."));
    let output = output_of(Command::new("apt-cache").args(["search", "--names-only", &pattern]))
        .context("kernels come from Debian's package lists")?;
    let names = output.lines().filter_map(|line| line.split_whitespace().next());
    Ok(names.max_by_key(|name| numbers(name)).map(str::to_owned))
}

/// The numbers in a name, which is how versions are compared.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn unpack(package: &str, root: &Path) -> Result<()> {
    let release = package.trim_start_matches(PREFIX);
    debian::unpack(package, root, |root| {
        run(Command::new("/sbin/depmod").arg("-b").arg(root).arg(release), "see what depmod says above")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_read_without_its_options() {
        for (line, file) in [
            ("insmod /a b/dummy.ko numdummies=0", Some("/a b/dummy.ko")),
            ("insmod /a/sit.ko.xz ", Some("/a/sit.ko.xz")),
            ("builtin netkit", None),
        ] {
            assert_eq!(module_file(line), file);
        }
    }

    #[test]
    fn versions_are_compared_by_number() {
        let names = ["linux-image-6.12.9+deb12-cloud-amd64", "linux-image-6.12.117+deb12-cloud-amd64"];
        assert_eq!(names.into_iter().max_by_key(|name| numbers(name)), Some(names[1]));
        assert_eq!(numbers("linux-image-6.1.0-56-cloud-amd64"), [6, 1, 0, 56, 64]);
    }
}
