//! Known values give known verdicts.

use super::*;
use std::path::Path;

fn proof(claims: Vec<Claim>) -> Proof {
    let mut proof = Proof::new(7, "A test, with \"quotes\"", "nobody")
        .metric(Metric::new("rate", "tokens", "tokens per call"))
        .metric(Metric::new("time", "s", "time").lower_is_better())
        .label("phase")
        .plot("rate")
        .plot("time");
    proof.claims = claims;
    proof
}

/// `n` units; the arm `b` has `ratio` times the rate of `a`, with some noise.
fn run(claims: Vec<Claim>, n: usize, ratio: f64, dir: &Path) -> Outcome {
    let mut recorder = Recorder::start(proof(claims), Setup::default()).unwrap();
    for i in 0..n {
        for repeat in 0..2 {
            let base = 1.0 + 0.1 * (i % 4) as f64;
            let noise = 1.0 + 0.02 * ((i * 7 + repeat * 3) % 5) as f64 - 0.04;
            for (arm, rate) in [("a", base), ("b", base * ratio * noise)] {
                let row = Row::new(arm, format!("unit {i}, the \"{i}th\"\nline"))
                    .group(["x", "y"][i % 2])
                    .repeat(repeat)
                    .label("phase", if repeat == 0 { "first" } else { "last" })
                    .value("rate", rate)
                    .value("time", 1.0 / rate);
                recorder.push(row).unwrap();
            }
        }
    }
    recorder.finish(dir).unwrap()
}

#[test]
fn true_false_and_undecided_claims() {
    let dir = tempfile::tempdir().unwrap();
    let faster = || {
        Claim::ratio("rate", "b", "a")
            .text("b is faster")
            .paper("1.3x")
    };
    let cases = [
        (1.2, faster().above(1.0), Verdict::Holds),
        (0.8, faster().above(1.0), Verdict::Fails),
        (1.0, faster().above(1.0), Verdict::Inconclusive),
        (1.0, faster().at_least(0.9), Verdict::Holds),
        (0.8, faster().at_least(0.9), Verdict::Fails),
        (
            1.2,
            Claim::ratio("time", "b", "a").median().below(1.0),
            Verdict::Holds,
        ),
        (
            0.8,
            Claim::ratio("time", "b", "a").median().below(1.0),
            Verdict::Fails,
        ),
        (
            1.2,
            Claim::difference("rate", "b", "a").above(0.1),
            Verdict::Holds,
        ),
        (
            1.2,
            Claim::difference("rate", "b", "a").at_most(0.1),
            Verdict::Fails,
        ),
        (2.0, Claim::level("rate", "b").at_least(1.5), Verdict::Holds),
        (2.0, Claim::level("rate", "b").above(2.9), Verdict::Fails),
        (1.2, Claim::level("rate", "b").always(1.0), Verdict::Fails),
    ];
    for ratio in [0.8, 1.0, 1.2, 2.0] {
        let of_ratio: Vec<_> = cases.iter().filter(|case| case.0 == ratio).collect();
        let claims: Vec<Claim> = of_ratio.iter().map(|case| case.1.clone()).collect();
        let outcome = run(claims.clone(), 12, ratio, dir.path());
        for ((_, claim, verdict), judged) in of_ratio.into_iter().zip(&outcome.result.claims) {
            assert_eq!(judged.verdict, *verdict, "{ratio} {claim:?} {judged:?}");
            assert_eq!((judged.n, &judged.paper), (12, &claim.paper));
        }
        let again = run(claims, 12, ratio, dir.path());
        assert_eq!(again.result.claims, outcome.result.claims, "it is seeded");
    }
    let outcome = run(vec![faster()], 12, 1.2, dir.path());
    let judged = &outcome.result.claims[0];
    assert!((judged.value.unwrap() - 1.2).abs() < 0.02);
    let [low, high] = judged.ci95.unwrap();
    assert!(low < judged.value.unwrap() && judged.value.unwrap() < high && high - low < 0.05);
    assert!(judged.p_value.unwrap() < 0.001);
}

#[test]
fn labels_select_rows_and_few_units_decide_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let last = Side::only("b", "phase", "last");
    let first = Side::only("b", "phase", "first");
    let claim = Claim::ratio("rate", last, first)
        .at_least(0.9)
        .text("as good at the end");
    let outcome = run(vec![claim.clone()], 12, 1.0, dir.path());
    assert_eq!(outcome.result.claims[0].verdict, Verdict::Holds);
    let few = run(vec![claim], 4, 1.0, dir.path());
    let judged = &few.result.claims[0];
    assert_eq!(judged.verdict, Verdict::Inconclusive);
    assert!(judged.reason.as_ref().unwrap().contains("too few"));
}

#[test]
fn hostile_values_decide_nothing_and_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let claims = || {
        vec![
            Claim::ratio("rate", "b", "a").text("ratio"),
            Claim::ratio("rate", "a", "absent").text("absent"),
            Claim::level("rate", "b").always(1.0).text("always"),
        ]
    };
    for (value, reason) in [
        (Some(f64::NAN), "not a finite number on 'unit 3'"),
        (Some(f64::INFINITY), "not a finite number"),
        (None, "has no rate on 'unit 3'"),
    ] {
        let mut recorder = Recorder::start(proof(claims()), Setup::default()).unwrap();
        for i in 0..8 {
            recorder
                .push(Row::new("a", format!("unit {i}")).value("rate", 1.0))
                .unwrap();
            let row = Row::new("b", format!("unit {i}"));
            let row = row.maybe("rate", if i == 3 { value } else { Some(1.0) });
            recorder.push(row).unwrap();
        }
        let outcome = recorder.finish(dir.path()).unwrap();
        for judged in &outcome.result.claims {
            assert_eq!(judged.verdict, Verdict::Inconclusive, "{judged:?}");
        }
        let said = outcome.result.claims[0].reason.clone().unwrap();
        assert!(said.contains(reason), "{said}");
        let absent = outcome.result.claims[1].reason.clone().unwrap();
        assert!(absent.contains("no rows of 'absent'"), "{absent}");
    }
    // A baseline of zero, and units that do not match.
    let mut recorder = Recorder::start(proof(claims()), Setup::default()).unwrap();
    for i in 0..8 {
        recorder
            .push(Row::new("a", format!("unit {i}")).value("rate", 0.0))
            .unwrap();
        recorder
            .push(Row::new("b", format!("unit {i}")).value("rate", 1.0))
            .unwrap();
    }
    recorder
        .push(Row::new("absent", "elsewhere").value("rate", 1.0))
        .unwrap();
    let claims = recorder.finish(dir.path()).unwrap().result.claims;
    assert!(claims[0].reason.as_ref().unwrap().contains("zero"));
    assert!(claims[1].reason.as_ref().unwrap().contains("same units"));
    assert_eq!(claims[2].verdict, Verdict::Holds);
    // Nothing at all.
    let empty = Recorder::start(
        proof(vec![Claim::ratio("rate", "b", "a")]),
        Setup::default(),
    );
    let empty = empty.unwrap().finish(dir.path()).unwrap();
    assert_eq!(empty.result.claims[0].verdict, Verdict::Inconclusive);
    assert!(empty.png.is_none());
}

#[test]
fn files_hold_everything_and_are_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = run(
        vec![Claim::ratio("rate", "b", "a").text("faster")],
        6,
        1.5,
        dir.path(),
    );
    assert!(outcome.json.ends_with("07.json") && outcome.csv.ends_with("07.csv"));
    let png = std::fs::read(outcome.png.unwrap()).unwrap();
    assert!(png.starts_with(b"\x89PNG") && png.len() > 2000);
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        3,
        "nothing else is left"
    );
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&outcome.json).unwrap()).unwrap();
    for key in [
        "system",
        "title",
        "claims",
        "arms",
        "command",
        "commit",
        "version",
        "seeds",
        "weights_sha256",
        "prompts_sha256",
        "date",
        "wall_seconds",
        "load",
        "machine",
        "quick",
    ] {
        assert!(json.get(key).is_some(), "{key}");
    }
    assert_eq!(json["claims"][0]["verdict"], "holds");
    let text = std::fs::read_to_string(&outcome.csv).unwrap();
    assert_eq!(
        text.lines().next(),
        Some("arm,unit,group,repeat,phase,rate,time")
    );
    let columns = || {
        (
            vec!["phase".to_owned()],
            vec!["rate".to_owned(), "time".to_owned()],
        )
    };
    let (labels, metrics) = columns();
    let table = Table::from_csv(&text, labels, metrics).unwrap();
    assert_eq!(table.rows().len(), 24);
    assert_eq!(table.to_csv(), text);
    let shown = outcome.result.to_string();
    assert!(
        shown.contains("holds") && shown.contains("faster"),
        "{shown}"
    );
}

#[test]
fn csv_round_trip_of_odd_values() {
    let columns = || (vec!["l".to_owned()], vec!["m".to_owned()]);
    let (labels, metrics) = columns();
    let mut table = Table::new(labels, metrics);
    let odd = [0.1 + 0.2, 1e-300, -0.0, f64::MAX, f64::INFINITY, 5e-324];
    for (i, value) in odd.into_iter().enumerate() {
        let row = Row::new("a,b", "\"q\"\r\nnext").repeat(i).value("m", value);
        table.push(row.label("l", "x\ny")).unwrap();
    }
    table.push(Row::new("none", "")).unwrap();
    let text = table.to_csv();
    let (labels, metrics) = columns();
    let read = Table::from_csv(&text, labels, metrics).unwrap();
    assert_eq!(read, table);
    let bits = |t: &Table| {
        t.rows()
            .iter()
            .map(|r| r.values.get("m").map(|v| v.to_bits()))
            .collect::<Vec<_>>()
    };
    assert_eq!(bits(&read), bits(&table));
    for (bad, why) in [
        ("arm,unit\n", "columns"),
        ("arm,unit,group,repeat,l,m\na,b\n", "line 2: 2 fields"),
        ("arm,unit,group,repeat,l,m\na,b,c,x,,1\n", "repeat 'x'"),
        ("arm,unit,group,repeat,l,m\na,b,c,0,,one\n", "m 'one'"),
        ("arm,unit,group,repeat,l,m\na,\"b,c,0,,1\n", "quote"),
    ] {
        let (labels, metrics) = columns();
        let error = Table::from_csv(bad, labels, metrics)
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    }
    assert!(table.push(Row::new("a", "b").value("other", 1.0)).is_err());
}

#[test]
fn claims_about_nothing_are_refused() {
    let bad = |p: Proof, why: &str| {
        let error = Recorder::start(p, Setup::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(why), "{error}");
    };
    bad(Proof::new(1, "t", "p"), "nothing is measured");
    bad(proof(vec![Claim::level("speed", "a")]), "not measured");
    bad(
        proof(vec![Claim::level("rate", "a").above(f64::NAN)]),
        "not finite",
    );
    let side = Side::only("a", "colour", "red");
    bad(proof(vec![Claim::level("rate", side)]), "label 'colour'");
    bad(proof(Vec::new()).label("rate"), "twice");
    bad(proof(Vec::new()).plot("speed"), "drawn");
}
