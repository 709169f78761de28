//! Builds a crate of eBPF programs into `OUT_DIR`, from where its users embed the objects.
//!
//! `AYA_BUILD_SKIP=1` skips that and leaves empty objects, which compile but cannot be loaded.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use aya_build::{Package, Toolchain};

/// Builds `package`, whose directory is `root_dir`, for each of its binaries an object of that name in `OUT_DIR`.
pub fn build(package: &str, root_dir: &str, binaries: &[&str]) {
    if let Err(error) = try_build(package, root_dir, binaries) {
        // `cargo::error` shows the message by itself, without the build script's whole output around it.
        for line in format!("{error:#}").lines() {
            println!("cargo::error={line}");
        }
    }
}

fn try_build(package: &str, root_dir: &str, binaries: &[&str]) -> Result<()> {
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let workspace = workspace()?;
    // aya-build watches the eBPF crate; these are what else goes into the object.
    for path in ["tunroute-common", "tunroute/build", "Cargo.toml", "Cargo.lock", "rust-toolchain.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    let path = path_with_tools(&workspace)?;
    if !skipped() {
        check_prerequisites(&path)?;
    }

    // SAFETY: a build script's main thread is its only one here.
    unsafe {
        env::set_var("PATH", path);
        // The pinned stable compiler takes `-Z build-std=core` in the build started below, and nowhere else.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build shows what the nested cargo says as warnings: keep that to real ones.
        env::set_var("CARGO_TERM_QUIET", "true");
        // One place for all profiles: there are several OUT_DIRs, and `core` would be compiled in each.
        env::set_var("CARGO_BUILD_BUILD_DIR", target_dir(&out_dir).join("ebpf"));
    }

    for binary in binaries {
        let object = out_dir.join(binary);
        fs::write(&object, []).with_context(|| format!("cannot write {}", object.display()))?;
    }
    aya_build::build_ebpf(
        [Package { name: package, root_dir, ..Package::default() }],
        Toolchain::Custom(&toolchain(&workspace)?),
    )
}

/// Whether aya-build will leave out the build, by the same rule as its own.
fn skipped() -> bool {
    env::var_os("AYA_BUILD_SKIP").is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"))
}

fn variable(name: &str) -> Result<OsString> {
    env::var_os(name).with_context(|| format!("{name} is not set: this build script is to be run by cargo"))
}

fn workspace() -> Result<PathBuf> {
    let crate_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let root = crate_dir.ancestors().skip(1).find(|directory| directory.join("Cargo.lock").is_file());
    Ok(root.context("this crate has no workspace around it")?.to_owned())
}

/// The target directory of the build that this script is a part of: `OUT_DIR` is TARGET/PROFILE/build/PACKAGE/out.
fn target_dir(out_dir: &Path) -> &Path {
    out_dir.ancestors().nth(4).unwrap_or(out_dir)
}

/// `PATH` with the place that `cargo xtask setup` installs bpf-linker into ahead of the rest.
fn path_with_tools(workspace: &Path) -> Result<OsString> {
    let tools = workspace.join("target/tools/bin");
    let inherited = env::var_os("PATH").unwrap_or_default();
    env::join_paths([tools].into_iter().chain(env::split_paths(&inherited)))
        .with_context(|| format!("the path of the workspace cannot stand in PATH: {}", workspace.display()))
}

/// Without these the nested build fails as well, but in many lines that do not say what to do.
fn check_prerequisites(path: &OsStr) -> Result<()> {
    let linker = env::split_paths(path).any(|dir| dir.join("bpf-linker").is_file());
    ensure!(linker, "the eBPF programs need bpf-linker, which is not installed: run `cargo xtask setup`");

    let rustc = variable("RUSTC")?;
    let output = Command::new(&rustc)
        .args(["--print", "sysroot"])
        .output()
        .with_context(|| format!("cannot run {}", rustc.display()))?;
    let sysroot = String::from_utf8(output.stdout).context("the path of the Rust toolchain is not UTF-8")?;
    let library = Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust/library/Cargo.lock");
    ensure!(
        library.is_file(),
        "the eBPF programs need the Rust component rust-src, which is not installed: run `cargo xtask setup`"
    );
    Ok(())
}

/// The toolchain that runs this build, by the name under which rustup knows it (the pinned version may well be
/// installed as `stable`). A cargo that was started without rustup leaves the pinned name.
fn toolchain(workspace: &Path) -> Result<String> {
    if let Ok(name) = env::var("RUSTUP_TOOLCHAIN") {
        return Ok(name);
    }
    let file = workspace.join("rust-toolchain.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    text.lines()
        .find_map(|line| line.trim_start().strip_prefix("channel")?.split('"').nth(1))
        .map(str::to_owned)
        .with_context(|| format!("{} names no channel", file.display()))
}
