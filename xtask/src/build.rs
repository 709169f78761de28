//! What is built here, and where it lies.
//!
//! Every task but `dist` and `bench` builds with the profile `dev` and selects all default members of the workspace. So
//! all of them need the same features of the dependencies, and nothing is compiled twice.

use std::{
    env,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::command::{cargo, output_of, run, say};

/// Builds tunroute and the demo; returns the directory that they lie in.
pub fn programs() -> Result<PathBuf> {
    say("building tunroute");
    // Only with examples among them are these the features that tests need.
    let what = ["build", "--bin", "tunroute", "--bin", "demo", "--examples"];
    run(&mut cargo(what)?, "see the compiler's messages above")?;
    target_dir("debug")
}

/// Writes the manual pages, schemas and other documents that are made of the code into `directory`.
pub fn documents(directory: &Path) -> Result<()> {
    run(cargo(["run", "--quiet", "--example", "documents", "--"])?.arg(directory), "see above for what is wrong")
}

/// The directory of a profile's build. It lies beside the one that this program comes from, wherever cargo has been told
/// to put them.
pub fn target_dir(profile: &str) -> Result<PathBuf> {
    let this = env::current_exe().context("cannot tell where this program lies")?;
    let target = this.parent().and_then(Path::parent).context("this program lies outside of a target directory")?;
    Ok(target.join(profile))
}

/// A binary of tests.
pub struct TestBinary {
    /// The name of its target: the crate's for unit tests, the file's for integration tests.
    pub name: String,
    /// Is it made of a crate's own unit tests?
    pub is_unit: bool,
    pub path: PathBuf,
    /// The package's directory, from which cargo would start it.
    pub package: PathBuf,
}

/// Builds every test.
pub fn tests() -> Result<Vec<TestBinary>> {
    say("building the tests");
    let mut build = cargo(["test", "--no-run", "--message-format=json-render-diagnostics"])?;
    build.stderr(Stdio::inherit());
    let messages = output_of(&mut build)?;
    Ok(messages.lines().filter_map(|line| test_binary(&serde_json::from_str(line).ok()?)).collect())
}

/// The binary that a message of cargo is about, if it is one of tests.
fn test_binary(message: &Value) -> Option<TestBinary> {
    if message["profile"]["test"] != Value::Bool(true) {
        return None;
    }
    Some(TestBinary {
        name: message["target"]["name"].as_str()?.to_owned(),
        is_unit: message["target"]["kind"][0] != "test",
        path: message["executable"].as_str()?.into(),
        package: Path::new(message["manifest_path"].as_str()?).parent()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn test_binaries_are_told_from_other_artifacts() {
        let message = |test: bool, kind: &str| {
            json!({
                "reason": "compiler-artifact", "manifest_path": "/w/tests/Cargo.toml", "executable": "/t/x-1",
                "target": { "name": "x", "kind": [kind] }, "profile": { "test": test }
            })
        };
        let found = |message: Value| test_binary(&message).map(|binary| (binary.is_unit, binary.package));
        assert_eq!(found(message(true, "test")), Some((false, "/w/tests".into())));
        assert_eq!(found(message(true, "lib")), Some((true, "/w/tests".into())));
        assert_eq!(found(message(false, "example")), None);
        assert_eq!(found(json!({ "reason": "build-finished", "success": true })), None);
    }
}
