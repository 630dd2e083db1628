"""Write `examples/prompts/train.jsonl` and `eval.jsonl`: our own small English, Chinese and code prompt set.

Topics x ways of asking. The split is by topic, so no evaluation topic is ever trained on.

    python examples/make_prompts.py
"""

import json
import random
from pathlib import Path

ENGLISH = """the American Civil War; supply and demand; the human heart; the solar system; photosynthesis; democracy;
the French Revolution; memory and learning; the moon; inflation; culture and society; the Roman Empire; sleep;
the immune system; marketing; the Great Depression; stars and galaxies; personality; the constitution; climate change;
philosophy; the industrial revolution; money and banks; language; the brain; leadership; religion; the atom; cities;
the telescope; public policy; trade between countries; children and parents; emotions; taxes; art and music; the media;
exercise and health; college life; human rights; volcanoes; the ocean; bacteria; the planets; ancient Greece; elections;
gender roles; social class; a good friend; entrepreneurs; free will; the Supreme Court; the cell; gravity; slavery;
the cold war; unemployment; the family; stress; the scientific method; markets and prices; the Vietnam War; anxiety;
the sun; immigration; ethics; groups and teams; Jupiter; the bill of rights; motivation; travel; food; movies; a dog;
football; a good book; the weather""".replace("\n", " ")
CHINESE = """北京; 数组; 操作系统; 二叉树; 深度学习; 神经网络; 数据库; 唐朝; 线程; 排序算法; 长江; 缓存; 上海; 图论;
动态规划; 梯度下降; 足球; 电影; 音乐; 地铁; 故宫; 春节; 语言模型; 卷积; 锁; 消息队列; 索引; 网络协议; 贪心算法;
栈和队列; 香港; 台湾; 大学; 历史; 文学; 天气; 酒店; 餐馆; 旅游; 健康; 睡眠; 焦虑; 家庭; 朋友; 学习方法;
工作压力; 组件; 状态; 函数; 变量; 字符串; 递归; 概率; 矩阵; 线段树; 哈希表; 最短路; 微服务; 事务; 内存; 面试;
垃圾回收; 日本; 中国古代史; 飞机; 火车; 病毒; 糖尿病; 感冒; 高血压; 咖啡; 书法; 地震; 恐龙; 太阳系; 经济; 城市;
军事; 铁路; 植物""".replace("\n", " ")
CODE = """adds two numbers; reverses a string; checks if a number is prime; sorts a list; finds the largest element;
counts the words in a text; computes the factorial of a number; merges two sorted lists; reads a file line by line;
removes duplicates from a list; computes the greatest common divisor; checks if a string is a palindrome;
finds the sum of a list; computes the Fibonacci sequence; searches a sorted list; flattens a nested list;
counts the vowels in a string; converts Celsius to Fahrenheit; finds the shortest path in a graph; rotates a matrix;
computes the average of a list; checks if a year is a leap year; finds the longest word; swaps two variables;
prints the multiplication table; generates a random password; parses a date; validates an email address;
inserts a node into a binary tree; implements a stack; implements a queue; transposes a matrix;
converts a number to binary; counts the digits of a number; finds all divisors of a number; computes a power;
splits a list into chunks; finds the intersection of two lists; encrypts a text with a Caesar cipher;
finds the second largest number""".replace("\n", " ")

ASK = {
    "en": (
        ENGLISH,
        ["What is {}?", "Tell me about {}.", "Explain {} in simple words.", "Write a short text about {}.",
         "Why is {} important?"],
    ),
    "zh": (CHINESE, ["介绍一下{}。", "什么是{}？", "请简单说明{}。", "为什么要了解{}？", "我想知道关于{}的事情。"]),
    "code": (
        CODE,
        ["Write a Python function that {}.", "Write a Java program that {}.", "How do I write code that {}?",
         "Write a JavaScript function that {}.", "用 Python 写一个函数：{}"],
    ),
}  # fmt: skip


def main() -> None:
    rng = random.Random(0)
    split: dict[str, list[dict[str, object]]] = {"train": [], "eval": []}
    for category, (topics, templates) in ASK.items():
        names = [t.strip() for t in topics.split(";")]
        rng.shuffle(names)
        held_out = names[: len(names) // 6]
        for name in names:
            if name in held_out:
                chosen, target = rng.sample(templates, 3 if category == "code" else 2), "eval"
            else:
                chosen, target = templates, "train"
            for template in chosen:
                messages = [{"role": "user", "content": template.format(name)}]
                split[target].append({"category": category, "messages": messages})
    for target, rows in split.items():
        rng.shuffle(rows)
        rows = [{"id": f"{target}-{i}", **row} for i, row in enumerate(rows)]
        path = Path(__file__).parent / "prompts" / f"{target}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path.name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
