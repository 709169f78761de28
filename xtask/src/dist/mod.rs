//! `cargo xtask dist`: a stripped binary with the eBPF programs inside, and a Debian package around it.
//!
//! The package is made by `dpkg-deb`: whoever makes or tests it is on Debian or has the program, and it checks what it
//! packs. debhelper would call cargo in ways of its own to do the same.

mod layout;
mod root;

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use self::layout::{DIRECTORIES, FILES, From, MAINTAINER_SCRIPTS};
use crate::{
    build::{self, target_dir},
    command::{cargo, is_root, output_of, run, say, workspace},
    setup,
};

/// Builds everything; returns the path of the package.
pub fn dist() -> Result<PathBuf> {
    setup::for_building()?;
    setup::for_packaging()?;
    let dir = workspace()?.join("target/dist");
    let documents = dir.join("documents");
    let advice = "see the compiler's messages above";
    say("building tunroute and its manual");
    run(&mut cargo(["build", "--release", "--package", "tunroute", "--bin", "tunroute"])?, advice)?;
    build::documents(&documents)?;

    let binary = dir.join("tunroute");
    run(
        Command::new("strip").arg("-o").arg(&binary).arg(target_dir("release")?.join("tunroute")),
        "see what strip says above",
    )?;
    let package = package(&dir, &binary, &documents)?;
    for file in [&binary, &package] {
        let size = fs::metadata(file).with_context(|| format!("cannot stat {}", file.display()))?.len();
        say(format_args!("{} ({} kB)", file.display(), size / 1000));
    }
    Ok(package)
}

/// The Debian package.
fn package(dir: &Path, binary: &Path, documents: &Path) -> Result<PathBuf> {
    let root = dir.join("package");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    let workspace = workspace()?;
    for directory in DIRECTORIES {
        make_directory(&root.join(directory))?;
    }
    for (from, to, mode) in FILES {
        let (base, name) = match from {
            From::Workspace(name) => (workspace.as_path(), name),
            From::Documents(name) => (documents, name),
        };
        install(&base.join(name), &root.join(to), *mode)?;
    }
    install(binary, &root.join("usr/bin/tunroute"), 0o755)?;
    manual(documents, &root)?;

    let version = env!("CARGO_PKG_VERSION");
    let architecture = output_of(Command::new("dpkg").arg("--print-architecture"))?;
    let values = [
        ("@VERSION@", version.to_owned()),
        ("@ARCHITECTURE@", architecture.trim().to_owned()),
        ("@SIZE@", (size(&root)? / 1024).to_string()),
        ("@DEPENDS@", dependencies(dir, binary)?),
    ];
    let control = root.join("DEBIAN");
    let source = workspace.join("tunroute/debian");
    make_directory(&control)?;
    for name in MAINTAINER_SCRIPTS {
        install(&source.join(name), &control.join(name), 0o755)?;
    }
    let template = source.join("control");
    let mut text = fs::read_to_string(&template).with_context(|| format!("cannot read {}", template.display()))?;
    for (name, value) in values {
        text = text.replace(name, &value);
    }
    write(&control.join("control"), &text)?;
    let settings = FILES.iter().map(|(_, to, _)| *to).filter(|to| to.starts_with("etc/"));
    write(&control.join("conffiles"), &settings.map(|to| format!("/{to}\n")).collect::<String>())?;

    let package = dir.join(format!("tunroute_{version}_{}.deb", architecture.trim()));
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "--build"]).arg(&root).arg(&package);
    run(&mut build, "see what dpkg-deb says above")?;
    Ok(package)
}

/// The manual pages, compressed, as Debian wants them.
fn manual(documents: &Path, root: &Path) -> Result<()> {
    let entries = fs::read_dir(documents).with_context(|| format!("cannot read {}", documents.display()))?;
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Some(number) = path.extension().and_then(|number| number.to_str()) else { continue };
        if !matches!(number, "5" | "8") {
            continue;
        }
        let page = root.join("usr/share/man").join(format!("man{number}")).join(name);
        install(&path, &page, 0o644)?;
        // No time in it: the same source makes the same package.
        run(Command::new("gzip").arg("-9n").arg(&page), "see what gzip says above")?;
    }
    Ok(())
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    make_directory(to.parent().context("a file needs a directory")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).with_context(|| format!("cannot chmod {}", to.display()))
}

/// The bytes of all files below a directory.
fn size(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry.context("cannot read a directory")?;
        let meta = entry.metadata().context("cannot stat a file")?;
        bytes += if meta.is_dir() { size(&entry.path())? } else { meta.len() };
    }
    Ok(bytes)
}

/// The libraries that the binary needs, in Debian's words: `libc6 (>= 2.34), libgcc-s1 (>= 4.2)`.
fn dependencies(dir: &Path, binary: &Path) -> Result<String> {
    // It insists on being in a source package.
    let source = dir.join("shlibdeps");
    make_directory(&source.join("debian"))?;
    write(&source.join("debian/control"), "Source: tunroute\n\nPackage: tunroute\nArchitecture: any\n")?;
    let output = output_of(Command::new("dpkg-shlibdeps").arg("-O").arg(binary).current_dir(&source))?;
    let depends = output.lines().find_map(|line| line.strip_prefix("shlibs:Depends="));
    Ok(depends.context("dpkg-shlibdeps names no library")?.to_owned())
}

/// Makes the package, installs it in a clean Debian root, and runs the story there.
pub fn test(args: &[OsString]) -> Result<()> {
    let package = dist()?;
    setup::for_labs()?;
    setup::for_clean_roots()?;
    ensure!(is_root(), "a clean Debian root is made by root: start this as root");
    let root = root::CleanRoot::make(&workspace()?.join("target/dist"))?;
    root.install(&package)?;
    let mut story = cargo(["test", "--test", "suites"])?;
    story.args(["--", "dist::", "--ignored"]).args(args).env("TUNROUTE_DIST_ROOT", root.path());
    run(&mut story, "see above which part of the story failed")
}
