use std::time::Instant;

use serde_json::json;

use crate::{ChatOptions, ChatTemplate, Error, Message};

/// The shape that many small models use, with a system prompt of its own.
const WITH_DEFAULT_SYSTEM: &str = "\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Be kind.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}";

fn render(source: &str, messages: &[Message]) -> crate::Result<String> {
    let options = ChatOptions {
        add_generation_prompt: false,
        ..ChatOptions::default()
    };
    ChatTemplate::new(source)?.render(messages, &options)
}

#[test]
fn default_system_prompt_is_the_template_s_business() {
    let template = ChatTemplate::new(WITH_DEFAULT_SYSTEM).unwrap();
    let with = template
        .render(&[Message::user("Hi")], &ChatOptions::default())
        .unwrap();
    assert_eq!(
        with,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let own = [
        Message::system("Be brief."),
        Message::user("Hi"),
        Message::assistant("Yes?"),
    ];
    assert_eq!(
        render(WITH_DEFAULT_SYSTEM, &own).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    );
}

#[test]
fn chatml_on_request() {
    let messages = [Message::system("S"), Message::user("{{ U }}")];
    let prompt = ChatTemplate::chatml()
        .render(&messages, &ChatOptions::default())
        .unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{{ U }}<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn many_features_as_jinja_has_them() {
    let template = ChatTemplate::new(include_str!("features.jinja")).unwrap();
    let messages = [
        Message::system("  Be <kind> & brief.\n"),
        Message::user("Hi \"there\" é"),
        Message::assistant("<think>hm</think>\n\nHello!"),
        Message::user("It's <b>"),
    ];
    let mut options = ChatOptions {
        bos_token: Some("<s>".to_owned()),
        ..ChatOptions::default()
    };
    let tools =
        json!([{"name": "f", "parameters": {"x": [1, 2.5, true, null], "e": {}, "s": "é<'>"}}]);
    options.extra.insert("tools".to_owned(), tools);
    assert_eq!(
        template.render(&messages, &options).unwrap(),
        include_str!("features.prompt.txt")
    );

    let mut options = ChatOptions {
        add_generation_prompt: false,
        ..options
    };
    options.extra = serde_json::Map::from_iter([("enable_thinking".to_owned(), json!(false))]);
    assert_eq!(
        template.render(&messages[1..2], &options).unwrap(),
        "<s><USER>Hi \"there\" é</user>#1! role=TrueNoneTrue[1, 'a', {'k': None}]\n\
         True 7 3 False é \"ereht\" iH a+b user Ji \"there\" é"
    );
}

#[test]
fn blocks_are_trimmed() {
    let source = "  {% for m in messages %}\n  [{{ m.content }}]\n  {% endfor %}\nend\n";
    assert_eq!(
        render(source, &[Message::user("a"), Message::user("b")]).unwrap(),
        "  [a]\n  [b]\nend"
    );
}

#[test]
fn generation_marks_are_transparent() {
    let source = "a {%- generation -%}  b  {%- endgeneration %} {% generation %}c{%endgeneration%}{{ '{% generation' }}";
    assert_eq!(render(source, &[]).unwrap(), "ab c{% generation");
}

#[test]
fn dates_come_from_the_options() {
    let template = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}").unwrap();
    let options = ChatOptions {
        now: Some(1_700_000_000),
        ..ChatOptions::default()
    };
    assert_eq!(template.render(&[], &options).unwrap(), "14 Nov 2023");
    assert!(template.render(&[], &ChatOptions::default()).unwrap().len() >= 11);
    let error = render("\n{{ strftime_now('%Q') }}", &[]).unwrap_err();
    assert!(
        matches!(&error, Error::Template { line: Some(2), reason } if reason.contains("%Q")),
        "{error}"
    );
}

#[test]
fn errors_name_the_line() {
    let refusal = "{% for m in messages %}\n{% if m.role == 'tool' %}\n{{ raise_exception('no tools here') }}\n{% endif %}\n{% endfor %}";
    assert_eq!(render(refusal, &[Message::user("x")]).unwrap(), "");
    let error = render(refusal, &[Message::new("tool", "x")]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "chat template, line 3: invalid operation: no tools here"
    );

    for (source, line) in [
        ("\n\n{% if %}", 3),
        ("{{ 'a", 1),
        ("\n{% for x in %}{% endfor %}", 2),
        ("{% endfor %}", 1),
        ("a\nb\n{{ messages|nosuchfilter }}", 3),
        ("{{ nosuchfunction() }}", 1),
        ("\n{{ missing.field.deeper }}", 2),
        ("{{ messages[0].content.nosuchmethod() }}", 1),
        ("{{ 'a' + 1 }}", 1),
        ("\n{% include 'other' %}", 2),
    ] {
        let error = render(source, &[Message::user("x")]).unwrap_err();
        assert!(
            matches!(error, Error::Template { line: Some(n), .. } if n == line),
            "{source:?}: {error}"
        );
    }
    assert!(ChatTemplate::new("{% if %}").is_err());
}

#[test]
fn hostile_templates_come_to_an_end() {
    let start = Instant::now();
    let loops = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    let recursion = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000));
    let blocks = "{% if true %}".repeat(50_000);
    let output = "{% for a in range(5000) %}{{ 'x' * 1000000 }}{% endfor %}";
    for source in [
        loops,
        recursion,
        &deep,
        &blocks,
        output,
        &"x".repeat(2 << 20),
    ] {
        let error = render(source, &[]).unwrap_err();
        assert!(
            matches!(error, Error::Limits(_) | Error::Template { .. }),
            "{error}"
        );
    }
    assert!(matches!(render(loops, &[]), Err(Error::Limits(_))));
    assert!(matches!(render(output, &[]), Err(Error::Limits(_))));
    assert!(start.elapsed().as_secs() < 20);
}

#[test]
fn long_conversations_are_no_attack() {
    let messages: Vec<Message> = (0..5000)
        .map(|n| Message::user(format!("message {n} {}", "x".repeat(500))))
        .collect();
    let prompt = render(WITH_DEFAULT_SYSTEM, &messages).unwrap();
    assert!(prompt.len() > 2_500_000);
}

#[test]
fn deep_values_do_not_overflow_the_stack() {
    let nested = "{% set n = namespace(l=[]) %}{% for a in range(1000) %}{% for i in range(1000) %}{% set n.l = [n.l] %}{% endfor %}{% endfor %}";
    // As many messages as give a template all the steps there are.
    let many = vec![Message::user(""); 8000];
    assert!(matches!(render(nested, &many), Err(Error::Limits(_))));
    let most = nested.replacen("range(1000)", "range(300)", 1);
    render(&most, &many).unwrap();
    for use_of_it in [
        "{{ n.l ~ '' }}",
        "{{ n.l == [n.l] }}",
        "{{ n.l }}",
        "{{ n.l | tojson }}",
    ] {
        drop(render(&format!("{most}{use_of_it}"), &many));
    }
    let cyclic = "{% set n = namespace() %}{% set n.n = n %}{{ n ~ '' }}";
    let error = render(cyclic, &[]).unwrap_err().to_string();
    assert!(error.contains("by its attributes"), "{error}");
}

#[test]
fn no_damaged_template_panics() {
    let source = include_str!("features.jinja");
    let messages = [Message::user("Hi"), Message::assistant("Ho")];
    for end in (0..source.len()).filter(|&n| source.is_char_boundary(n)) {
        drop(render(&source[..end], &messages));
        let mut damaged = source.to_owned();
        damaged.replace_range(end..source.len().min(end + 3), "%}{");
        drop(render(&damaged, &messages));
    }
}

#[test]
fn messages_and_options_are_serialisable() {
    let messages: Vec<Message> =
        serde_json::from_str(r#"[{"role": "user", "content": "Hi"}]"#).unwrap();
    assert_eq!(messages, [Message::user("Hi")]);
    let options: ChatOptions = serde_json::from_str(r#"{"bos_token": "<s>"}"#).unwrap();
    assert_eq!(
        options,
        ChatOptions {
            bos_token: Some("<s>".to_owned()),
            ..ChatOptions::default()
        }
    );
}
