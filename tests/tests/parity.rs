//! Every reference case that is supported, against its expected outputs.

#[test]
fn supported_cases_agree_and_the_rest_are_listed() {
    let (mut passed, mut open, mut failures) = (0, Vec::new(), Vec::new());
    for dir in sequor_tests::case_folders() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let case = sequor_tests::read_case(&dir).unwrap();
        if !sequor_tests::supported(&case) {
            open.push(name);
            continue;
        }
        match sequor_tests::run(&dir).and_then(|outputs| sequor_tests::compare(&dir, &outputs)) {
            Ok(problems) if problems.is_empty() => passed += 1,
            Ok(problems) => failures.push(format!("{}: {}", dir.display(), problems.join("; "))),
            Err(e) => failures.push(format!("{}: {e}", dir.display())),
        }
    }
    println!(
        "{passed} reference cases pass; not supported yet: {}",
        open.join(", ")
    );
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    assert!(
        passed >= 28,
        "the repository's own cases under tests/parity are missing"
    );
}

#[test]
fn a_wrong_output_is_noticed() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("parity/llama");
    let mut outputs = sequor_tests::run(&dir).unwrap();
    let logits = outputs.get_mut("logits").unwrap();
    *logits = &*logits + 0.01;
    assert_eq!(sequor_tests::compare(&dir, &outputs).unwrap().len(), 1);
    outputs.clear();
    assert_eq!(
        sequor_tests::compare(&dir, &outputs).unwrap(),
        ["logits: missing"]
    );
}
