//! The list of systems, as `sequor systems` prints it and as the README shows it.

use crate::cli::{run, stderr, stdout};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

#[test]
fn the_readme_has_the_table_of_systems() {
    let results = root().join("docs/results");
    let o = run(&[
        "systems",
        "--markdown",
        "--results",
        &results.display().to_string(),
    ]);
    assert!(o.status.success(), "{}", stderr(&o));
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, rest) = readme.split_once("<!-- systems: begin -->\n").unwrap();
    let (table, _) = rest.split_once("<!-- systems: end -->").unwrap();
    assert!(
        table == stdout(&o),
        "the README's table is not what the results say: run `sequor systems --update README.md`"
    );
    assert_eq!(table.lines().count(), 2 + 51);
    for page in table
        .split("](")
        .skip(1)
        .filter_map(|s| s.split(')').next())
    {
        assert!(root().join(page).is_file(), "{page} is not there");
    }
}

#[test]
fn the_table_is_put_between_its_marks_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.md");
    let path = file.display().to_string();
    let results = dir.path().display().to_string();
    let update = || run(&["systems", "--update", &path, "--results", &results]);
    std::fs::write(&file, "before\n").unwrap();
    assert_eq!(update().status.code(), Some(2));
    let marked = "before\n<!-- systems: begin -->\nold\n<!-- systems: end -->\nafter\n";
    std::fs::write(&file, marked).unwrap();
    assert!(update().status.success());
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.starts_with("before\n<!-- systems: begin -->\n| "));
    assert!(text.ends_with("|\n<!-- systems: end -->\nafter\n"));
    assert!(!text.contains("\nold\n") && text.contains("not run"));
    // A result that is damaged counts as none.
    std::fs::write(dir.path().join("23.json"), "{").unwrap();
    let o = run(&["systems", "--results", &results]);
    assert!(o.status.success());
    let hydra = stdout(&o)
        .lines()
        .find(|l| l.contains("Hydra"))
        .unwrap()
        .to_owned();
    assert!(hydra.contains("not run"), "{hydra}");
    assert!(stdout(&o).lines().filter(|l| !l.is_empty()).count() >= 51);
}

#[test]
fn systems_that_cannot_be_reproduced_are_usage_errors() {
    for (args, why) in [
        (vec!["reproduce", "1"], "15 (ADED)"),
        (vec!["reproduce", "99"], "1 to 51"),
        (
            vec!["reproduce", "15", "--prompts", "/no/such/file"],
            "no such file",
        ),
        (vec!["reproduce", "15", "--dtype", "f8"], "f8"),
        (vec!["reproduce", "15", "--threads", "0"], "--threads"),
    ] {
        let o = run(&args);
        assert_eq!(o.status.code(), Some(2), "{args:?}: {}", stderr(&o));
        assert!(stderr(&o).contains(why), "{}", stderr(&o));
    }
}
